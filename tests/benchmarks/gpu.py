"""Every figure of a GPU, in less than ten minutes on one card.

    python -m tests.benchmarks.gpu [--output FOLDER]

Writes gpu.json and gpu.md: Hiera-B in fp16 and bf16, as it is and compiled, against the other
libraries and a ViT-B/16 of the same size; a training step of the autoencoder; and images per second
from files to answers, against the model and decoding alone. A case that does not fit in the time is
left out, and named. Without a GPU, nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from hiera_core.benchmarking import report

from .speed import COLUMNS, Case, line
from .throughput import write_photos

LIMIT_S = 570.0  # for all cases together
SECONDS = 4  # of measuring each implementation
PEERS = "--against reference,timm,hiera-optim,vit"
TRAIN = "--mode train --against reference,hiera-optim"
CASES = {
    "eager_fp16": Case("Hiera-B, fp16", f"{{image}} --dtype fp16 {PEERS}"),
    "compiled_fp16": Case(
        "Hiera-B, fp16, compiled", f"{{image}} --dtype fp16 --compile {PEERS}", compiled=True
    ),
    "train_bf16": Case("MAE training step, bf16", f"{{mae}} --dtype bf16 {TRAIN}"),
    "train_compiled_bf16": Case(
        "MAE training step, bf16, compiled",
        f"{{mae}} --dtype bf16 --compile {TRAIN}",
        compiled=True,
    ),
    "eager_bf16": Case("Hiera-B, bf16", f"{{image}} --dtype bf16 {PEERS}"),
    "compiled_bf16": Case(
        "Hiera-B, bf16, compiled", f"{{image}} --dtype bf16 --compile {PEERS}", compiled=True
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(), help="folder of gpu.json and gpu.md")
    parser.add_argument("--model", default="hiera_base_224", help="try the script on a small model")
    parser.add_argument("--device", default="cuda", help="try the script without a GPU: cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for all cases")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("there is no GPU on this machine (torch.cuda.is_available() is False): no figures")
    end = time.monotonic() + options.limit
    answers = files_to_answers(options)  # first, because it is short
    results: dict[str, list[report.Measurement]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            path = Path(folder) / f"{name}.json"
            if measure(case, path, options, end - time.monotonic()):
                results[name] = report.read(path)
                machine = json.loads(path.read_text())["header"]
    write(options.output, results, answers, machine if results else {})


def measure(case: Case, path: Path, options: argparse.Namespace, seconds: float) -> bool:
    """Run `hiera bench` for a case. Return whether it was done in time."""
    common = f"--attention fused --device {options.device} -b {options.batch} --seconds {SECONDS}"
    words = case.arguments.format(image=options.model, mae=f"mae_{options.model}").split()
    command = [sys.executable, "-m", "hiera_cli", "bench", *words, *common.split()]
    if seconds <= 0:
        return False
    process = subprocess.Popen([*command, f"--export={path}"], stdout=subprocess.DEVNULL)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends its workers, which would disturb the next case
        process.wait()
        return False
    return code in (0, 1) and path.exists()  # 1: a peer failed, and the file says so


def files_to_answers(options: argparse.Namespace) -> dict[str, float]:
    """Return images per second of `hiera predict` without start-up, of its model, and of decoding
    in all its threads."""
    from concurrent.futures import ThreadPoolExecutor

    from hiera_core import Predictor, create_model
    from hiera_core.data import sources
    from hiera_core.data.image_reader import open_image

    model = create_model(options.model).eval()
    predictor = Predictor(model, device=options.device, dtype="auto", batch_size=options.batch)
    classifier = predictor.classifier("image")
    with tempfile.TemporaryDirectory() as folder:
        count = 2000 if options.device.startswith("cuda") else 40
        paths = write_photos(Path(folder), count, (500, 375))
        list(predictor(sources.expand(map(str, paths[: 2 * options.batch]))))

        def decode(path: Path) -> object:
            return classifier.transform.crop(open_image(path)[0])

        start = time.perf_counter()
        with ThreadPoolExecutor(predictor.workers) as pool:
            views = list(pool.map(decode, paths))
        decoding = count / (time.perf_counter() - start)
        start = time.perf_counter()
        classifier.run(views)
        alone = count / (time.perf_counter() - start)
        start = time.perf_counter()
        records = list(predictor(sources.expand(map(str, paths))))
        together = count / (time.perf_counter() - start)
    assert all(record.status == "ok" for record in records)
    best = min(decoding, alone)
    return {"files": together, "model": alone, "decoding": decoding, "share": together / best}


def write(
    folder: Path,
    results: dict[str, list[report.Measurement]],
    answers: dict[str, float],
    header: dict[str, object],
) -> None:
    """Write gpu.json and gpu.md, and print the table."""
    text = f"{header.get('machine', 'not measured')}; torch {torch.__version__}.\n\n"
    text += f"| our speed, relative to | {' | '.join(COLUMNS)} | ours |\n"
    text += "| --- " * (len(COLUMNS) + 2) + "|\n"
    for name, found in results.items():
        compiled = CASES[name].compiled
        text += line(CASES[name].title, found, compiled, compiled)
    text += (
        f"\nFrom files to answers: {answers['files']:.0f} images/s, {answers['share']:.0%} of the "
        f"slower of the model ({answers['model']:.0f}) and decoding ({answers['decoding']:.0f}).\n"
    )
    missing = [case.title for name, case in CASES.items() if name not in results]
    if missing:
        text += f"\nNot measured, because the time was over or it failed: {', '.join(missing)}.\n"
    folder.mkdir(parents=True, exist_ok=True)
    figures = {name: [one.to_json() for one in found] for name, found in results.items()}
    document = {"header": header, "files_to_answers": answers, "cases": figures}
    (folder / "gpu.json").write_text(json.dumps(document, indent=2))
    (folder / "gpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
