"""Tests of compiled models: one program for a stream, programs of an earlier run, and machines
without a compiler or memory."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hiera_core
from hiera_core.compiling import aot_package, compiled
from hiera_core.compiling.compiled import KeptPrograms, translate_compile_errors
from hiera_core.compiling.program_cache import ProgramCache
from hiera_core.compiling.program_key import program_key
from hiera_core.data import memory
from hiera_core.data.sources import Source
from hiera_core.errors import DeviceError
from hiera_core.inference.features import BatchExtractor, FeatureSelection
from hiera_core.inference.predict import Classifier, Predictor
from hiera_core.inference.reconstruct import BatchReconstructor

from .conftest import SMALL, assert_close, draw_weights

CPU = torch.device("cpu")
TINY = {**SMALL, "embed_dim": 8, "stages": (1, 1), "q_pool": 1, "input_size": (32, 32)}
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="--compile needs a C++ compiler"
)


def tiny(seed: int = 0, **config: Any) -> Any:
    return draw_weights(hiera_core.Hiera(**{**TINY, **config}), seed).eval()


def views(count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return list(generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))


def sources_of(count: int) -> list[Source]:
    return [memory.as_source(view, number) for number, view in enumerate(views(count))]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace the compiler by one that notes the batch size of every program."""
    sizes: list[int] = []

    def make(self: KeptPrograms, args: Any, kwargs: Any) -> Callable[..., Any]:
        sizes.append(len(args[0]))
        return self.function

    monkeypatch.setattr(KeptPrograms, "_make", make)
    return sizes


# Streams ------------------------------------------------------------------------------------------


def test_a_stream_of_mixed_arrival_needs_one_program(made: list[int]) -> None:
    """A thousand inputs come one by one, in bursts and with pauses; some cannot be read, and some
    are videos, which this model does not take."""
    draw = random.Random(0)
    pictures = views(8)

    def arriving() -> Iterator[Any]:
        for number in range(1000):
            if draw.random() < 0.05:
                time.sleep(0.002)
            kind = draw.random()
            if kind < 0.05:
                yield b"not an image"
            elif kind < 0.1:
                yield np.zeros((3, 32, 32, 3), np.uint8)
            else:
                yield pictures[number % 8]

    predictor = Predictor(tiny(), dtype="fp32", batch_size=8, compile=True)
    records = list(predictor(map(memory.as_source, arriving(), range(1000))))
    assert len(records) == 1000
    assert 850 < sum(record.status == "ok" for record in records) < 950
    assert made == [8]


def test_few_inputs_are_compiled_for_their_number(made: list[int]) -> None:
    predictor = Predictor(tiny(), dtype="fp32", batch_size=8, compile=True)
    assert len(list(predictor(sources_of(3)))) == 3
    assert made == [3]
    assert len(list(predictor(sources_of(20)))) == 20
    assert made == [3, 8], "a larger batch gets one more program, for whole batches"


def test_memory_that_runs_out_in_a_program_halves_the_batch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The message is that of PyTorch's allocator, which a compiled program passes on."""
    tried: list[int] = []

    def make(self: KeptPrograms, args: Any, kwargs: Any) -> Callable[..., Any]:
        def program(x: torch.Tensor) -> Any:
            tried.append(len(x))
            if len(x) > 4:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")
            return self.function(x)

        return program

    monkeypatch.setattr(KeptPrograms, "_make", make)
    predictor = Predictor(tiny(), dtype="fp32", batch_size=8, compile=True)
    plain = Predictor(tiny(), dtype="fp32", batch_size=8)
    found, expected = (list(one(sources_of(11))) for one in (predictor, plain))
    assert [r.topk[0].id for r in found] == [r.topk[0].id for r in expected]
    assert tried == [8, 4, 4, 4] and "continuing with batches of 4" in caplog.text


# Keys ---------------------------------------------------------------------------------------------


def key_of(model: nn.Module, shape: tuple[int, ...] = (2, 3, 32, 32), **options: Any) -> str | None:
    x = torch.zeros(shape, dtype=next(model.parameters()).dtype)
    return program_key(model, "forward", ((x,), {}), options)


def test_equal_models_have_equal_keys() -> None:
    key = key_of(tiny())
    assert key is not None and len(key) == 32
    assert key_of(tiny()) == key


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.head.projection.bias.data.add_(1e-6),
        lambda model: model.set_attention("eager"),
        lambda model: model.bfloat16(),
        lambda model: setattr(model.norm, "eps", 1e-3),
        lambda model: model.train(),
    ],
    ids=["weights", "attention", "dtype", "epsilon", "training"],
)
def test_keys_differ_with_what_is_computed(change: Callable[[Any], object]) -> None:
    model = tiny()
    key = key_of(model)
    with torch.no_grad():
        change(model)
    assert key_of(model) not in (key, None)


def test_keys_differ_with_the_call_and_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    model, keys = tiny(), set()
    keys |= {key_of(model), key_of(model, (3, 3, 32, 32)), key_of(model, freezing=False)}
    x = torch.zeros(2, 3, 32, 32)
    keys |= {
        program_key(model, "other", ((x,), {}), {}),
        program_key(model, "forward", ((x,), {"check_ids": False}), {}),
        program_key(model, "forward", ((x.mT,), {}), {}),
    }
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    keys.add(key_of(model))
    torch.set_num_threads(before)
    monkeypatch.setattr("hiera_core.compiling.program_key._processor", lambda: "another")
    keys.add(key_of(model))
    assert len(keys) == 8 and None not in keys


def test_models_with_code_of_others_have_no_key() -> None:
    class Mine(nn.Identity):
        pass

    model, hooked = tiny(), tiny()
    model.norm = Mine()
    hooked.norm.register_forward_hook(lambda *_: None)
    replaced = tiny()
    replaced.norm.forward = lambda x: x
    method = tiny()
    method.embedding = lambda ends: ends[-1].mean(1)
    assert [key_of(one) for one in (model, hooked, replaced, method)] == [None] * 4


# The compiler -------------------------------------------------------------------------------------


def test_without_a_compiler_the_model_runs_uncompiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(aot_package, "has_compiler", lambda: False)
    model, x = tiny(), torch.randn(2, 3, 32, 32)
    program = KeptPrograms(model, model, ProgramCache(tmp_path))
    assert torch.equal(program(x), model(x)) and torch.equal(program(x), model(x))
    assert caplog.text.count("there is no C++ compiler for --compile") == 1
    assert "g++" in caplog.text


@needs_compiler
def test_the_next_run_finds_the_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(aot_package.OPTIONS, "aot_inductor.compile_wrapper_opt_level", "O0")
    monkeypatch.setenv("HIERA_COMPILED_FOLDER", str(tmp_path))
    options: Any = {"dtype": "fp32", "compile": True, "batch_size": 2}
    expected = Classifier(tiny(), dtype="fp32")(views(3))
    assert_close(Classifier(tiny(), **options)(views(3)), expected)
    (path,) = tmp_path.iterdir()
    compiling = pytest.MonkeyPatch()
    compiling.setattr(KeptPrograms, "_compile", lambda *_: pytest.fail("it was compiled again"))
    try:
        assert_close(Classifier(tiny(), **options)(views(3)), expected)
        with pytest.raises(pytest.fail.Exception):
            Classifier(tiny(seed=1), **options)(views(3))
        content = path.read_bytes()
        path.write_bytes(content[:-100])
        with pytest.raises(pytest.fail.Exception):
            Classifier(tiny(), **options)(views(3))
        assert "is damaged" in caplog.text
        # Whatever is in the folder under the right name and digest may still be no program.
        other = ProgramCache().add(path.name[:32], b"no package")
        assert other is not None
        with pytest.raises(pytest.fail.Exception):
            Classifier(tiny(), **options)(views(3))
        assert "cannot be loaded" in caplog.text
    finally:
        compiling.undo()


@needs_compiler
def test_a_compiler_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("g++: internal error")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fail)
    monkeypatch.setenv("HIERA_COMPILED_FOLDER", str(tmp_path))
    with pytest.raises(DeviceError, match="cannot compile the program"):
        Classifier(tiny(), compile=True)(views(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_programs_of_every_task_compute_what_the_model_does(dtype: str, tmp_path: Path) -> None:
    classifier = tiny()
    encoder = draw_weights(hiera_core.mae_hiera_nano_32(pretrained=True)).eval()
    whole = FeatureSelection((1, 2), pool=False)
    runners: list[tuple[Any, Any, dict[str, Any]]] = [
        (Classifier, classifier, {}),
        (BatchExtractor, classifier, {"selection": whole}),
        (BatchReconstructor, encoder, {}),
        (BatchReconstructor, encoder, {"raw": True}),
    ]
    for kind, model, options in runners:
        plain = kind(model, dtype=dtype, **options).run(views(2))
        runner = kind(model, dtype=dtype, compile=True, **options)
        found = runner.run(views(2))
        for ours, expected in zip(found, plain, strict=True):
            for a, b in zip(_tensors(ours), _tensors(expected), strict=True):
                assert_close(a.float(), b.float(), 1e-4 if dtype == "fp32" else 0.1)
        programs = next(p for p in vars(runner).values() if isinstance(p, KeptPrograms))
        assert all(isinstance(p, aot_package.Package) for p in programs._programs.values())


def _tensors(found: Any) -> list[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        return [found]
    return list(found.values() if isinstance(found, dict) else vars(found).values())


def test_models_of_others_are_compiled_by_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    function = compiled.compile_for_inference(nn.Linear(3, 4), CPU)
    assert not isinstance(function, KeptPrograms) and function(torch.ones(2, 3)).shape == (2, 4)


def test_memory_that_runs_out_in_the_compiler_is_no_error_of_the_compiler() -> None:
    class BackendCompilerFailed(RuntimeError):
        __module__ = "torch._dynamo.exc"

    with pytest.raises(BackendCompilerFailed), translate_compile_errors():
        raise BackendCompilerFailed("backend='inductor' raised: CUDA out of memory")
    with pytest.raises(DeviceError, match=r"torch\.compile failed"), translate_compile_errors():
        raise BackendCompilerFailed("no compiler")
