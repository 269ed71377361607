"""Run `hiera bench`, and write the tables of speed in README.md and docs/benchmarks.md.

    python -m tests.benchmarks.speed [--keep DIR] [--only NAME ...] [--machine NAME] [--write]

Prints this machine's part of the section of docs/benchmarks.md. With --write, puts it there, and
the table of ratios in the README, in place of an earlier part with the same name of the machine.
With --keep, stores the measurements in a folder, and reuses those it holds.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hiera_core.benchmarking import report
from hiera_core.benchmarking.job import OURS
from hiera_core.benchmarking.measurement import Measurement, ratio_of

ROOT = Path(__file__).parents[2]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- python -m tests.benchmarks.speed --write -->", "<!-- end -->"


@dataclass(frozen=True)
class Case:
    """A row of the table of ratios, and the arguments of `hiera bench` that measure it."""

    title: str
    arguments: str
    compiled: bool = False


IMAGE = "hiera_base_224 --attention fused --seconds 12"
VIDEO = "hiera_base_16x224 --attention fused --seconds 15"
MAE = "mae_hiera_base_224 --attention fused --mode grad --seconds 15"
PEERS = ("reference", "timm", "transformers", "hiera-optim", "vit")
ALL = f"--against {','.join(PEERS)}"
CASES = {
    "b_fp32": Case("Hiera-B, 8 images, fp32", f"{IMAGE} --dtype fp32 {ALL}"),
    "b_bf16": Case("Hiera-B, 8 images, bf16", f"{IMAGE} --dtype bf16 {ALL},reference:fp32"),
    "c_bf16": Case(
        "the same, ours with `--compile`, peers not compiled",
        f"{IMAGE} --dtype bf16 --compile "
        "--against reference,timm,transformers,hiera-optim,reference:fp32",
        compiled=True,
    ),
    "v_fp32": Case(
        "video Hiera-B, a clip, fp32", f"{VIDEO} --dtype fp32 --against reference,hiera-optim"
    ),
    "v_bf16": Case(
        "video Hiera-B, a clip, bf16", f"{VIDEO} --dtype bf16 --against reference,hiera-optim"
    ),
    "m_fp32": Case(
        "autoencoder of Hiera-B, 4 images, forward and backward, fp32",
        f"{MAE} --dtype fp32 --against reference,transformers,hiera-optim",
    ),
    "m_bf16": Case(
        "the same, bf16", f"{MAE} --dtype bf16 --against reference,transformers,hiera-optim"
    ),
}
COLUMNS = (*PEERS, "reference, fp32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="folder of the measurements")
    parser.add_argument("--only", nargs="+", choices=[*CASES, "all"], help="measure only these")
    parser.add_argument("--machine", metavar="NAME", help="name of the processor")
    parser.add_argument("--write", action="store_true", help="write the tables")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        names = options.only or [*CASES, "all"]
        for name in names:
            arguments = "--all" if name == "all" else CASES[name].arguments
            measure(folder / f"{name}.json", arguments)
        title = machine(folder, names, options.machine)
        text = title + section(folder, names)
        ratios = title + table_of_ratios(folder, names)
    print(text)
    if options.write:
        for page, part in ((PAGE, text), (README, ratios)):
            page.write_text(with_part(page.read_text(), title, part))


def with_part(page: str, title: str, part: str) -> str:
    """Return a page with the part of a machine between its markers. It replaces an earlier part of
    the same machine; those of others stay."""
    before, rest = page.split(BEGIN, 1)
    parts, after = rest.split(END, 1)
    # A part begins with a line that ends with the versions.
    found = re.split(r"\n\n(?=[^|`\n]*; torch [^\n]*\.\n)", f"\n{parts.strip()}")
    kept = {text.strip().partition(";")[0]: text.strip() for text in found if text.strip()}
    kept[title.strip().partition(";")[0]] = part.strip()
    return f"{before}{BEGIN}\n\n" + "\n\n".join(kept.values()) + f"\n{END}{after}"


def measure(path: Path, arguments: str) -> None:
    """Run `hiera bench` and export its measurements, unless the file exists."""
    if not path.exists():
        command = [sys.executable, "-m", "hiera_cli", "bench", *arguments.split()]
        code = subprocess.run([*command, f"--export={path}"]).returncode
        if code not in (0, 1):  # 1: a peer failed, and the file has its error
            sys.exit(code)


def section(folder: Path, names: list[str]) -> str:
    """Return the ratios, the commands, and the ten classifiers, as Markdown."""
    cases = [CASES[name] for name in names if name != "all"]
    text = table_of_ratios(folder, names)
    if cases:
        text += "\n```sh\n"
        text += "".join(f"hiera bench {case.arguments}\n" for case in cases) + "```\n"
    if "all" in names:
        document = json.loads((folder / "all.json").read_text())
        text += f"\n`hiera bench --all`. {' '.join(document['header']['changes'])}\n\n"
        text += report.rows_as_markdown(report.read(folder / "all.json"))
    return text


def machine(folder: Path, names: list[str], processor: str | None) -> str:
    """Return a line about the machine and the versions, with another name of the processor if one
    is given."""
    header = json.loads((folder / f"{names[0]}.json").read_text())["header"]
    name, rest = header["machine"].split(", ", 1)
    return f"\n{processor or name}, {rest}; torch {header['torch']}, Python {header['python']}.\n"


def table_of_ratios(folder: Path, names: list[str]) -> str:
    """Return a Markdown table of our speed relative to each peer."""
    cases = {name: CASES[name] for name in names if name != "all"}
    if not cases:
        return ""
    text = f"\n| our speed, relative to | {' | '.join(COLUMNS)} | ours |\n"
    text += "| --- " * (len(COLUMNS) + 2) + "|\n"
    for name, case in cases.items():
        results = report.read(folder / f"{name}.json")
        text += line(case.title, results, case.compiled, False)
        if case.compiled:
            text += line("the same, peers compiled too", results, True, True)
    return text


def line(title: str, results: list[Measurement], compiled: bool, peers_compiled: bool) -> str:
    """Return a row of the table: medians of the rounds, and their quartiles."""
    ours = next(r for r in results if r.implementation == OURS and r.compiled == compiled)
    cells = []
    for column in COLUMNS:
        peer, _, dtype = column.partition(", ")
        variant = (peer, dtype or ours.dtype, peers_compiled)
        ratios = [
            ratio_of(r, ours)
            for r in results
            if (r.implementation, r.dtype, r.compiled) == variant and r.rounds
        ]
        cells += [f"{median:.2f} ({low:.2f}-{high:.2f})" for low, median, high in ratios] or [""]
    rate = f"{ours.throughput:.3g} {ours.unit}/s"
    return f"| {title} | {' | '.join(cells)} | {rate} |\n"


if __name__ == "__main__":
    main()
