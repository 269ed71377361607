"""Tests of `hiera predict` and of its pipeline, on real images."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hiera as reference
import numpy as np
import pytest
import torch
from PIL import Image

import hiera_core
from hiera_cli.output_formats import format_table
from hiera_core import zoo
from hiera_core.data import sources
from hiera_core.device import has_native_bf16, select_device, select_dtype
from hiera_core.errors import DeviceError, UsageError

from .conftest import PICTURES, SMALL, RunProcess, assert_close, draw_weights
from .fork_server import ForkServer

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """Return a folder of good and bad files: good, truncated, text, good, empty, good."""
    folder = tmp_path_factory.mktemp("mixed")
    content = (pictures / "coffee.png").read_bytes()
    (folder / "0.png").write_bytes(content)
    (folder / "1.png").write_bytes(content[: len(content) // 2])
    (folder / "2.png").write_text("not a picture")
    (folder / "3.png").write_bytes((pictures / "rocket.png").read_bytes())
    (folder / "4.png").touch()
    (folder / "5.png").write_bytes((pictures / "chelsea.png").read_bytes())
    return folder


# Results ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_classes_and_probabilities_match_the_reference(
    hiera: Command, pictures: Path, tmp_path: Path
) -> None:
    """Compare with the reference: its checkpoint, its preprocessing, real images."""
    from torchvision import transforms

    model = draw_weights(reference.hiera_base_224()).eval()
    torch.save({"model_state": model.state_dict()}, tmp_path / "base.pth")
    recipe = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    paths = [pictures / f"{name}.png" for name in PICTURES]
    options = ("--checkpoint", tmp_path / "base.pth", "--dtype", "fp32", "-f", "jsonl")
    code, out, _ = hiera("predict", *paths, *options)
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [r["input"] for r in records] == [str(p) for p in paths]
    for path, record in zip(paths, records, strict=True):
        probs, ids = model(recipe(Image.open(path))[None])[0].topk(5)
        assert [guess["id"] for guess in record["topk"]] == ids.tolist()
        assert_close(torch.tensor([g["prob"] for g in record["topk"]]), probs, 1e-4)
        assert record["model"] == "hiera_base_224"


def test_labels_match_torchvision() -> None:
    from torchvision.models import ResNet50_Weights
    from torchvision.models.video import MViT_V2_S_Weights

    from hiera_core.zoo import labels

    images = labels.class_names("imagenet1k")
    assert list(images) == ResNet50_Weights.DEFAULT.meta["categories"]
    assert images[207] == "golden retriever"
    videos = labels.class_names("kinetics400")
    assert list(videos) == MViT_V2_S_Weights.DEFAULT.meta["categories"]
    assert videos[363] == "training dog"


def test_results_do_not_depend_on_the_batch(small_folder: Path, pictures: Path) -> None:
    paths = [str(p) for p in sorted(pictures.iterdir())] * 4
    together = hiera_core.predict(paths, str(small_folder), batch_size=16, dtype="fp32", topk=10)
    for path, record in zip(paths, together, strict=True):
        alone = hiera_core.predict(path, str(small_folder), dtype="fp32", topk=10)
        for guess, other in zip(alone["topk"], record["topk"], strict=True):
            assert guess["id"] == other["id"]
            assert guess["prob"] == pytest.approx(other["prob"], abs=1e-5)


# Streams and records ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 4, 100])
def test_each_input_has_one_record_in_order(
    hiera: Command, small_folder: Path, mixed: Path, batch: int
) -> None:
    code, out, err = hiera("predict", mixed, "-m", small_folder, "-b", batch, "-j", 3)
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert [Path(r["input"]).name for r in records] == [f"{i}.png" for i in range(6)]
    assert [r["index"] for r in records] == list(range(6))
    assert [r["status"] for r in records] == ["ok", "error", "error", "ok", "error", "ok"]
    bad = records[1]
    assert bad["topk"] == [] and bad["error"]["type"] == "InputError" and bad["error"]["hint"]
    lines = err.splitlines()
    assert sum(line.startswith(f"hiera: {mixed}") for line in lines) == 3
    assert lines[-1] == "hiera: 3 ok, 3 failed"


def test_good_results_do_not_depend_on_bad_neighbours(small_folder: Path, mixed: Path) -> None:
    predictor = hiera_core.Predictor(str(small_folder), dtype="fp32", batch_size=4)
    everything = list(predictor(sources.expand([str(mixed)])))
    good = [r for r in everything if r.status == "ok"]
    clean = list(predictor(sources.expand([r.input for r in good])))
    for record, alone in zip(good, clean, strict=True):
        assert [g.id for g in record.topk] == [g.id for g in alone.topk]
        assert [g.prob for g in record.topk] == pytest.approx(
            [g.prob for g in alone.topk], abs=1e-6
        )


def test_output_formats(hiera: Command, small_folder: Path, mixed: Path, tmp_path: Path) -> None:
    arguments = ("predict", mixed / "0.png", mixed / "1.png", "-m", small_folder, "-k", 3)
    _, lines, _ = hiera(*arguments, "-f", "jsonl")
    records = [json.loads(line) for line in lines.splitlines()]
    assert list(records[0]) == [
        "input",
        "index",
        "status",
        "kind",
        "model",
        "topk",
        "notes",
        "error",
    ]

    _, out, _ = hiera(*arguments, "-f", "json")
    assert json.loads(out) == records
    _, out, _ = hiera(*arguments, "-f", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert rows[0]["top1_id"] == str(records[0]["topk"][0]["id"]) and "top3_prob" in rows[0]
    assert rows[1]["status"] == "error" and rows[1]["error_message"]
    _, out, _ = hiera(*arguments, "-f", "table")
    assert out.startswith(f"{mixed / '0.png'}\n") and out.count("%") == 3

    for ending in ("json", "jsonl", "csv"):
        target = tmp_path / f"out.{ending}"
        code, out, _ = hiera(*arguments, "-o", target)
        assert code == 1 and out == "" and target.stat().st_size > 100
        assert not target.with_name(target.name + ".partial").exists()
    assert [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()] == records


def test_class_names_from_a_file(hiera: Command, small_folder: Path, mixed: Path) -> None:
    names = mixed.parent / "names.txt"
    names.write_text("\n".join(f"kind {i}" for i in range(10)))
    _, out, _ = hiera("predict", mixed / "0.png", "-m", small_folder, "--labels", names)
    guess = json.loads(out)["topk"][0]
    assert guess["label"] == f"kind {guess['id']}"
    (mixed.parent / "few.txt").write_text("cat\ndog\n")
    few = ("--labels", mixed.parent / "few.txt")
    code, _, err = hiera("predict", mixed / "0.png", "-m", small_folder, *few)
    assert code == 2 and "there are 2 class names" in err and "10 classes" in err
    code, _, err = hiera("predict", mixed / "0.png", "-m", small_folder, "--labels", "gone.txt")
    assert code == 2 and "gone.txt" in err


def test_on_error_stop_ends_after_the_first_error(
    hiera: Command, small_folder: Path, mixed: Path
) -> None:
    code, out, _ = hiera("predict", mixed, "-m", small_folder, "--on-error", "stop")
    assert code == 1
    assert [json.loads(x)["status"] for x in out.splitlines()] == ["ok", "error"]


def test_output_files_are_replaced_only_with_overwrite(
    hiera: Command, small_folder: Path, mixed: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.jsonl"
    target.write_text("precious")
    arguments = ("predict", mixed / "0.png", "-m", small_folder)
    code, _, err = hiera(*arguments, "-o", target)
    assert code == 2 and "--overwrite" in err and target.read_text() == "precious"
    code, _, _ = hiera(*arguments, "-o", target, "--overwrite")
    assert code == 0 and "topk" in target.read_text()
    code, _, err = hiera(*arguments, "-o", tmp_path / "no" / "out.jsonl")
    assert code == 2 and "no folder" in err
    code, _, err = hiera(*arguments, "-o", tmp_path)
    assert code == 2 and "is a folder" in err


def test_resume_continues_after_the_last_record(
    hiera: Command, small_folder: Path, mixed: Path, tmp_path: Path
) -> None:
    arguments = ("predict", mixed, "-m", small_folder)
    _, complete, _ = hiera(*arguments)
    target = tmp_path / "out.jsonl"
    lines = complete.splitlines(keepends=True)
    (tmp_path / "out.jsonl.partial").write_text("".join(lines[:2]) + lines[2][:20])
    code, _, _ = hiera(*arguments, "-o", target, "--resume")
    assert code == 1 and target.read_text() == complete
    code, _, err = hiera(*arguments, "-o", tmp_path / "out.csv", "--resume")
    assert code == 2 and "jsonl" in err

    partial = tmp_path / "again.jsonl.partial"
    partial.write_text(complete)  # all inputs are done, and some of them failed
    code, _, err = hiera(*arguments, "-o", tmp_path / "again.jsonl", "--resume")
    assert code == 1 and err.endswith(f"3 ok, 3 failed -> {tmp_path / 'again.jsonl'}\n")
    for inputs, message in [
        (mixed / "0.png", "is nothing now"),
        (mixed / "[1-5].png", "input 0 was"),
    ]:
        partial.write_text("".join(lines[:2]))
        arguments = ("predict", inputs, "-m", small_folder, "-o", tmp_path / "again.jsonl")
        code, _, err = hiera(*arguments, "--resume", "--overwrite")
        assert code == 2 and message in err and partial.read_text() == "".join(lines[:2])
    partial.write_text("no record\n")
    code, _, err = hiera(*arguments, "--resume", "--overwrite")
    assert code == 2 and "line 1 is no record" in err


# Faults -----------------------------------------------------------------------------------------


def test_usage_errors_are_one_line(hiera: Command, pictures: Path, small_folder: Path) -> None:
    picture = pictures / "coffee.png"
    for arguments, message in [
        (["predct"], "predict"),
        (["predict"], "INPUTS"),
        (["predict", picture, "-m", "hiera_bas_224"], "did you mean hiera_base_224"),
        (["predict", picture, "--topk", "0"], "topk"),
        (["predict", picture, "--tpok", "3"], "--topk"),
        (["predict", picture, "-b", "many"], "neither auto nor a positive number"),
        (["predict", picture, "--dtype", "fp8"], "fp8"),
        (["predict", "@gone.txt"], "gone.txt"),
        (["predict", pictures / "*.gif"], "nothing matches"),
        (["predict", picture, "-m", "mae_hiera_tiny_224", "--random-init"], "autoencoder"),
        (["predict", picture, "--every", "1", "--segments", "1"], "choose one"),
        (["predict", picture, "--every", "nan"], "every is nan"),
        (["predict", picture, "-m", small_folder, "--segments", "1"], "--every"),
    ]:
        code, out, err = hiera(*arguments)
        assert (code, out) == (2, ""), arguments
        lines = [line for line in err.splitlines() if "--random-init" not in line]
        assert len(lines) == 1 and message in lines[0], err


def test_missing_cuda_is_an_error(hiera: Command, pictures: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    code, _, err = hiera("predict", pictures / "coffee.png", "--device", "cuda", "--random-init")
    assert code == 5 and "--device cpu" in err
    with pytest.raises(DeviceError):
        select_device("cuda")
    with pytest.raises(UsageError, match="cuda"):
        select_device("cud")


def test_the_default_dtype_depends_on_the_device() -> None:
    cpu = torch.device("cpu")
    assert select_dtype("auto", cpu) == (torch.bfloat16 if has_native_bf16() else torch.float32)
    assert select_dtype("auto", torch.device("cuda")) == torch.float16
    assert select_dtype("bf16", cpu) == torch.bfloat16


def test_out_of_memory_halves_the_batch(
    small_folder: Path, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    predictor = hiera_core.Predictor(str(small_folder), batch_size=8)
    classifier = predictor.classifier("image")
    sizes, run_batch = [], classifier._run_batch

    def limited(pixels: np.ndarray) -> torch.Tensor:
        sizes.append(len(pixels))
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_batch(pixels)

    classifier._run_batch = limited  # type: ignore[method-assign]
    records = list(predictor(sources.expand([str(pictures)] * 2)))
    assert len(records) == 8 and all(r.status == "ok" for r in records)
    assert sizes == [8, 4, 2, 2, 2, 2] and "batches of 2" in caplog.text

    def exhausted(pixels: np.ndarray) -> torch.Tensor:
        torch.empty(1 << 50)  # raises the real error of this machine's allocator

    classifier._run_batch = exhausted  # type: ignore[method-assign]
    with pytest.raises(DeviceError, match="no memory left"):
        list(predictor(sources.expand([str(pictures)])))


def test_the_model_of_the_caller_is_not_changed(pictures: Path) -> None:
    model = hiera_core.Hiera(**SMALL).train()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    record = hiera_core.predict(str(pictures / "coffee.png"), model, dtype="bf16")
    assert record["status"] == "ok" and model.training
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert model.pos_embed.dtype == torch.float32
    model.eval()
    assert hiera_core.Predictor(model).classifier("image").model is model, (
        "a model that needs no change is not copied"
    )
    with pytest.raises(UsageError, match="no classifier"):
        hiera_core.Predictor(hiera_core.Hiera(**{**SMALL, "num_classes": 0}))


def test_one_file_gives_a_record_and_a_folder_a_list(
    small_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "only.png").write_bytes((pictures / "coffee.png").read_bytes())
    assert isinstance(hiera_core.predict(tmp_path / "only.png", str(small_folder)), dict)
    assert isinstance(hiera_core.predict(tmp_path, str(small_folder)), list), (
        "a folder of one file also gives a list"
    )
    with pytest.raises(UsageError, match="holds no pictures"):
        (tmp_path / "none").mkdir()
        hiera_core.predict(tmp_path / "none", str(small_folder))


@pytest.mark.skipif(shutil.which("g++") is None, reason="--compile needs a C++ compiler")
def test_compile_does_not_change_results(
    hiera: Command, small_folder: Path, pictures: Path
) -> None:
    arguments = ("predict", pictures, "-m", small_folder, "--dtype", "fp32")
    _, plain, _ = hiera(*arguments)
    code, out, err = hiera(*arguments, "--compile")
    assert code == 0, err
    for ours, theirs in zip(plain.splitlines(), out.splitlines(), strict=True):
        a, b = json.loads(ours)["topk"], json.loads(theirs)["topk"]
        assert [g["id"] for g in a] == [g["id"] for g in b]
        assert [g["prob"] for g in a] == pytest.approx([g["prob"] for g in b], abs=1e-5)


def test_overflow_is_an_error_not_a_class(pictures: Path) -> None:
    model = draw_weights(hiera_core.Hiera(**SMALL))
    with torch.no_grad():
        model.norm.weight[0] = float("inf")
    record = hiera_core.predict(str(pictures / "coffee.png"), model)
    assert record["status"] == "error" and record["topk"] == []
    assert "bf16" in record["error"]["hint"]


def test_bf16_agrees_with_fp32(small_folder: Path, pictures: Path) -> None:
    exact = hiera_core.predict(str(pictures), str(small_folder), dtype="fp32")
    rough = hiera_core.predict(str(pictures), str(small_folder), dtype="bf16")
    for a, b in zip(exact, rough, strict=True):
        assert a["topk"][0]["prob"] == pytest.approx(b["topk"][0]["prob"], abs=0.05)


def test_random_init_is_reported(hiera: Command, pictures: Path) -> None:
    code, _, err = hiera(
        "predict", pictures / "rocket.png", "-m", "hiera_tiny_224", "--random-init"
    )
    assert code == 0 and "the outputs mean nothing" in err


def test_a_config_file_sets_options(
    hiera: Command, small_folder: Path, mixed: Path, tmp_path: Path
) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(f"model: {small_folder}\ntopk: 2\nformat: jsonl\n")
    _, out, _ = hiera("predict", mixed / "0.png", "--config", path)
    assert len(json.loads(out)["topk"]) == 2
    _, out, _ = hiera("predict", mixed / "0.png", "--config", path, "-k", 4)
    assert len(json.loads(out)["topk"]) == 4, "the command line has precedence"
    path.write_text("topkk: 2\n")
    code, _, err = hiera("predict", mixed / "0.png", "--config", path)
    assert code == 2 and "topkk" in err and "did you mean topk" in err


def test_a_closed_pipe_is_no_error(small_folder: Path, mixed: Path) -> None:
    command = f"{sys.executable} -m hiera_cli predict {mixed}/0.png {mixed}/3.png {mixed}/5.png"
    script = f"{command} -m {small_folder} -b 1 | head -c 1 > /dev/null; echo ${{PIPESTATUS[0]}}"
    # 2000 inputs have more results than a pipe can buffer.
    script = script.replace(f"{mixed}/5.png", f"{mixed}/5.png " * 2000)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stderr, done.stdout) == ("", "141\n")


@pytest.mark.parametrize(
    ("signum", "code"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        (signal.SIGHUP, -signal.SIGHUP),  # the terminal is closed
    ],
)
def test_signals_keep_finished_records(
    fork_server: ForkServer,
    small_folder: Path,
    mixed: Path,
    tmp_path: Path,
    signum: int,
    code: int,
) -> None:
    target = tmp_path / "out.jsonl"
    (tmp_path / "list.txt").write_text(f"{mixed / '0.png'}\n" * 20_000)
    arguments = ("predict", f"@{tmp_path}/list.txt", "-m", small_folder, "-o", target, "-b", "4")
    process = fork_server.start(tmp_path, *arguments)
    partial = tmp_path / "out.jsonl.partial"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signum)
    try:
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == code and "Traceback" not in err
    assert not target.exists()
    records = [json.loads(line) for line in partial.read_text().splitlines()]
    assert records and all(r["status"] == "ok" for r in records)


def test_a_closed_terminal_loses_no_results(
    small_folder: Path, mixed: Path, tmp_path: Path
) -> None:
    """`nohup hiera ... &` continues when its terminal is closed. Only the progress is lost."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    target = tmp_path / "out.jsonl"
    (tmp_path / "list.txt").write_text(f"{mixed / '0.png'}\n" * 200)
    command = f"trap '' HUP; exec {sys.executable} -m hiera_cli predict @{tmp_path}/list.txt"
    process = subprocess.Popen(
        ["bash", "-c", f"{command} -m {small_folder} -o {target} -b 4"],
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    partial = tmp_path / "out.jsonl.partial"
    while not (partial.exists() and partial.stat().st_size) and process.poll() is None:
        time.sleep(0.02)
    os.close(master)
    try:
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
        process.wait()
    assert len(target.read_text().splitlines()) == 200


@pytest.mark.parametrize(("closed", "code"), [(">&-", 5), ("2>&-", 0), ("<&-", 0), (">&- 2>&-", 5)])
def test_closed_streams_do_not_crash(
    small_folder: Path, mixed: Path, closed: str, code: int
) -> None:
    command = f"{sys.executable} -m hiera_cli predict {mixed}/0.png -m {small_folder} {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if ">&-" not in closed.split():
        assert json.loads(done.stdout)["status"] == "ok"


def test_file_names_need_not_be_utf8(
    fork_server: ForkServer, small_folder: Path, mixed: Path, tmp_path: Path
) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(raw)).write_bytes((mixed / "0.png").read_bytes())
    command = ["predict", raw, "-m", small_folder, "-f"]
    done = subprocess.run(
        [sys.executable, "-m", "hiera_cli", *command, "jsonl"], capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert os.fsencode(json.loads(done.stdout)["input"]) == raw
    command[1] = os.fsdecode(raw)
    for format in ("table", "csv"):
        process = fork_server.start(tmp_path, *command, format)
        assert process.wait(60) == 0, process.text("err")
        assert raw in process.output.with_suffix(".out").read_bytes()


def test_unexpected_errors_are_one_line_unless_debug(
    hiera: Command, monkeypatch: pytest.MonkeyPatch, pictures: Path
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(sources, "check_inputs", broken)
    code, _, err = hiera("predict", pictures / "coffee.png")
    assert code == 1 and err.count("\n") == 1 and "--debug" in err
    with pytest.raises(ZeroDivisionError):
        hiera("predict", pictures / "coffee.png", "--debug")


def test_models_lists_the_zoo(hiera: Command) -> None:
    code, out, _ = hiera("models", "-f", "json")
    entries = json.loads(out)
    assert code == 0 and [entry["name"] for entry in entries] == list(zoo.names())
    assert entries[2]["name"] == "hiera_base_224" and entries[2]["licence"] == "CC-BY-NC-4.0"
    assert (entries[2]["params"], entries[2]["speed"]) == (51524968, 1556)
    _, out, _ = hiera("models", "-f", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert rows[0]["checkpoints"] == "mae_in1k_ft_in1k, mae_in1k" and rows[0]["autoencoder"] == "no"
    _, out, _ = hiera("models", "tiny", "-f", "table")
    assert "hiera_tiny_224" in out and "hiera_base" not in out and "CC BY-NC" in out
    code, _, err = hiera("models", "hiera_bsae_224")
    assert code == 2 and "did you mean" in err


def test_tables_show_markup_and_long_cells_unchanged() -> None:
    rows = [["[bold]a[/bold]", "x" * 2000], ["b\tc", ":smile:"]]
    assert format_table(["label", "note"], rows).splitlines() == [
        "label           note",
        f"[bold]a[/bold]  {'x' * 2000}",
        "b       c       :smile:",
    ]
    assert format_table(["label", ""], []) == "label\n"


def test_version_and_completion(run_process: RunProcess) -> None:
    done = run_process("--version")
    assert done.stdout.strip() == f"hiera {hiera_core.__version__}"
    done = run_process(_HIERA_COMPLETE="complete_bash", COMP_WORDS="hiera mod", COMP_CWORD="1")
    assert "models" in done.stdout


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (7, {}, "an input is of type int"),
        ([{"path": "x.png"}], {}, "an input is of type dict"),
        ("", {}, "an input is an empty string"),
        ("x.png", {"topk": -1}, "topk is -1"),
        ("x.png", {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_wrong_arguments_are_refused(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        hiera_core.predict(source, "hiera_nano_32", **options)


def test_an_empty_input_is_not_this_folder(hiera: Command) -> None:
    code, out, err = hiera("predict", "", "-m", "hiera_nano_32")
    assert (code, out) == (2, "") and "an input is an empty string" in err
