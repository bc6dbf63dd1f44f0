# /// script
# requires-python = ">=3.11"
# dependencies = ["peft-icm"]
# ///
"""Train a generator on a collection of the Hub, on a machine of the Hub, and push it:

    hf jobs uv run --flavor a10g-small --secrets HF_TOKEN examples/hf_jobs_train.py me/my-loras me/my-generator --epochs 1200

or here, `uv run examples/hf_jobs_train.py ...`; until peft-icm is on PyPI, `uv run --with path/to/peft_icm.whl ...`. What stands behind the
two repos is for `peft-icm train`.
"""

import argparse
import sys

from peft_icm.cli import main

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("collection", help="Hub id of an adapter collection, which peft-icm collect made and peft-icm push uploaded")
parser.add_argument("repo_id", help="of the generator, created as a private repo")
args, options = parser.parse_known_args()
sys.exit(main(["train", args.collection, "-o", "generator", *options]) or main(["push", "generator", args.repo_id, "--private"]))
