"""Build the example of every authoring method, and measure it.

    python -m tests.proofs.authoring [MODEL …] [--only ROW …] [--no-server] [--write]

MODEL is the folder of a trained model; the default is SmolLM2, and Gemma if it is there. Each method is built by the
real command from `edit_store/authoring/examples/`, then the edited transformers model is measured on data that no build
reads, beside the base model, its opposite, and a control. At the end a real server serves the bundles, and what it says
is compared. The figures go into a JSON file beside this one, and with --write into the page on authoring.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from loadtests.harness.model import ensure_model
from tests.proofs.authoring import table
from tests.proofs.authoring.measuring import Bench, NotBuilt
from tests.proofs.authoring.proofs import PROOFS, Proof
from tests.proofs.authoring.serving import served_errors
from tests.support.gemma import FOLDER as GEMMA


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.proofs.authoring", description=__doc__)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--only", action="append", default=[], help="a row, or a method with all its rows")
    parser.add_argument("--no-server", action="store_true", help="do not serve the bundles")
    parser.add_argument("--keep", type=Path, help="keep the bundles here, and take those that are there")
    parser.add_argument("--write", action="store_true", help="write the tables into the page on authoring")
    args = parser.parse_args()
    wanted = [proof for proof in PROOFS if not args.only or {proof.name, proof.method} & set(args.only)]
    for model in args.models or [ensure_model(), *([GEMMA] if GEMMA.is_dir() else [])]:
        with tempfile.TemporaryDirectory() as folder:
            measure(model.resolve(), wanted, Path(args.keep or folder) / model.name, serve=not args.no_server)
    if args.write:
        table.PAGE.write_text(table.written(table.PAGE.read_text(encoding="utf-8"), table.TITLES), encoding="utf-8")


def measure(model: Path, proofs: list[Proof], folder: Path, *, serve: bool) -> None:
    """Measure these proofs on one model, and write each figure down as it comes."""
    folder.mkdir(parents=True, exist_ok=True)
    bench, figures, bundles = Bench(model, folder), table.kept(model.name), {}

    def write() -> None:
        ordered = {proof.name: figures[proof.name] for proof in PROOFS if proof.name in figures}
        table.record_of(model.name).write_text(json.dumps(ordered, indent=1) + "\n")

    for proof in proofs:
        try:
            found = bench.measure(proof)
        except NotBuilt as refusal:
            told = str(refusal).splitlines()[-1].strip(" -")
            figures[proof.name] = {"refused": told}
            print(f"{proof.name}: not built: {told}", file=sys.stderr)
        else:
            figures[proof.name] = found.as_json()
            bundles[proof.name], _, _ = bench.build(proof, proof.build, 0)
            print(f"{proof.name}: {found.base:.2f} -> {found.edited}, control {found.control}", file=sys.stderr)
        write()
    for how in ("slots", "weights"):
        of = {proof.name: bundles[proof.name] for proof in proofs if proof.name in bundles and proof.served == how}
        if of and serve:
            apart = served_errors(
                bench.host, model, folder / f"served-{how}", of, in_weights=how == "weights",
                say=lambda what: print(f"  served: {what}", file=sys.stderr),
            )  # fmt: skip
            for name, error in apart.items():
                figures[name]["served"] = error
            write()


if __name__ == "__main__":
    main()
