# /// script
# requires-python = ">=3.11"
# dependencies = ["peft-icm"]
# ///
"""Train a generator on a collection of the Hub, on a machine of the Hub, and push it:

    hf jobs uv run --flavor a10g-small --secrets HF_TOKEN examples/hf_jobs_train.py me/my-loras me/my-generator --epochs 1200

or here, `uv run examples/hf_jobs_train.py ...`; until peft-icm is on PyPI, `uv run --with path/to/peft_icm.whl ...`. What stands behind the
two repos is for `peft-icm train`; its --token is for all three steps.
"""

import argparse
import sys

from huggingface_hub.errors import HTTPError

from peft_icm.cli import main, parse
from peft_icm.hub.files import check_pushable

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("collection", help="Hub id of an adapter collection, which peft-icm collect made and peft-icm push uploaded")
parser.add_argument("repo_id", help="of the generator, created as a private repo")
parser.add_argument("options", nargs=argparse.REMAINDER, help="of peft-icm train, behind the two repos")
args = parser.parse_args()
train = ["train", args.collection, "-o", "generator", *args.options]
told = parse(train)
try:
    check_pushable(args.repo_id, private=True, token=told.token)  # who may not write to it learns so before the training
except (ValueError, OSError, HTTPError) as error:
    sys.exit(f"hf_jobs_train.py: error: {error}")
push = ["push", told.output, args.repo_id, "--private", *(["--token", told.token] if told.token else [])]
sys.exit(main(train) or main(push))
