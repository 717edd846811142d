"""The tables of docs/speed.md, from the figures that are kept in benchmarks/speed/.

python benchmarks/speed.py                    # the tables
python benchmarks/speed.py --run vit_b32_bf16 # measure again, on an idle machine, and keep the figures
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from common import markdown

KEPT = Path(__file__).resolve().parent / "speed"
B32 = "throughput.py --model_type ViT-B_32 --img_size 224 --train_batch_size 32"
TI = "throughput.py --model_type ViT-Ti_16 --img_size 32 --patch_size 4 --train_batch_size 128 --aug strong"
MEASURED = {
    "vit_b32_bf16": f"{B32} --bf16",
    "vit_b32_fp32": B32,
    "vit_ti_bf16": f"{TI} --bf16",
    "vit_ti_fp32": TI,
    "scaling": "scaling.py --bf16",
    "pipeline": "pipeline.py",
    "memory": "memory.py --rounds 3",
    "accuracy": "accuracy.py --seeds 1 2 3 4 5",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", choices=MEASURED, default=[], metavar="NAME", help=" ".join(MEASURED))
    for name in parser.parse_args().run:
        script, *words = MEASURED[name].split()
        command = [sys.executable, str(KEPT.parent / script), *words, "--json", str(KEPT / f"{name}.json")]
        subprocess.run(command, check=True)
    for name, words in MEASURED.items():
        for path in sorted(KEPT.glob(f"{name}*.json")):
            kept = json.loads(path.read_text(encoding="utf-8"))
            print(f"\n`python benchmarks/{words}`\n\n{kept['title']}; {kept['machine']}\n\n{markdown(kept['rows'])}")


if __name__ == "__main__":
    main()
