"""Text in, fixed-size blocks of token ids out."""

import glob
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
VALIDATION_SHARE = 0.05
MIN_DOCUMENTS = 20  # fewer are cut into pieces, so that some can be held out
TOKENIZER_CHARACTERS = 100_000_000  # a BPE learns nothing more from a longer text
CHARACTERS_PER_TOKEN = 6  # more than any BPE reaches on prose: bounds what is streamed

# Left out of the standard library: tests, tables and generated text.
_LEFT_OUT = {"encodings", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "turtledemo"}


@dataclass(frozen=True)
class Corpus:
    """Documents of the two splits; no document is in both."""

    source: str
    train: list[str]
    validation: list[str]

    @property
    def sha256(self) -> str:
        """Hash of both splits, in order, with every document preceded by its length in bytes."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            digest.update(f"{len(split)}:".encode())
            for document in split:
                data = document.encode("utf-8")
                digest.update(f"{len(data)}:".encode() + data)
        return digest.hexdigest()


def load_corpus(args) -> Corpus:
    """The corpus that the arguments name. ValueError says what is missing."""
    if args.train_files:
        source, documents = "--train_files", _read(args.train_files, args.output_dir)
    elif args.dataset:
        tokens = args.steps * args.batch_size * args.seq_length + args.eval_tokens
        source = f"--dataset {args.dataset}"
        documents = _stream(args.dataset, args.dataset_column, CHARACTERS_PER_TOKEN * tokens)
    else:
        source = f"the standard library of Python {sys.version.split()[0]}"
        documents = _standard_library()
    documents = _distinct(documents)
    if args.validation_files:
        validation = _distinct(_read(args.validation_files, args.output_dir))
        held_out = set(validation)
        train = [d for d in documents if d not in held_out]
        if documents and not train:
            raise ValueError(
                f"expected documents in {source} that are not in --validation_files, got none of "
                f"{len(documents)}"
            )
    else:
        train, validation = split(documents)
    return Corpus(source, train, validation)


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Holds out VALIDATION_SHARE of the text: the documents whose hashes come first."""
    if len(documents) < MIN_DOCUMENTS:
        size = sum(map(len, documents)) // (5 * MIN_DOCUMENTS) + 1
        documents = [piece for d in documents for piece in _cut_at_lines(d, size) if piece.strip()]
    wanted = VALIDATION_SHARE * sum(map(len, documents))
    hashes = [hashlib.sha256(d.encode("utf-8")).digest() for d in documents]
    held_out, taken = set(), 0
    for i in sorted(range(len(documents)), key=lambda i: (hashes[i], i)):
        if taken >= wanted or len(held_out) == len(documents) - 1:
            break
        held_out.add(i)
        taken += len(documents[i])
    train = [d for i, d in enumerate(documents) if i not in held_out]
    return train, [documents[i] for i in sorted(held_out)]


def _cut_at_lines(text: str, size: int) -> Iterator[str]:
    piece, length = [], 0
    lines = text.splitlines(keepends=True)
    for line in (line[i : i + size] for line in lines for i in range(0, len(line), size)):
        piece.append(line)
        length += len(line)
        if length >= size:
            yield "".join(piece)
            piece, length = [], 0
    yield "".join(piece)


def _distinct(documents) -> list[str]:
    return list(dict.fromkeys(d for d in documents if d.strip()))


def _standard_library() -> list[str]:
    """Sources of this Python's public modules, without tests. Differs between Python versions."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in sys.stdlib_module_names and _LEFT_OUT.isdisjoint(parts):
            documents.append(_read_text(path))
    if not documents:
        raise ValueError(
            f"expected Python's own sources (*.py) in {root}, got none: this Python was installed "
            "without them, give --train_files"
        )
    return documents


def _read(patterns: list[str], output: str) -> list[str]:
    """Texts by path or pattern, in order. Skips files below `output`: the run writes those itself."""
    paths: dict[Path, None] = {}  # a set that keeps its order
    for pattern in patterns:
        named = Path(pattern)  # brackets may be part of a name
        found = [named] if named.exists() else glob.glob(pattern, recursive=True)
        matches = [Path(p) for p in sorted(found)]
        if not matches:
            raise ValueError(f"expected text files at {pattern!r}, got none")
        for match in matches:
            below = sorted(match.rglob("*")) if match.is_dir() else [match]
            paths |= dict.fromkeys(p for p in below if p.is_file())
    written = Path(output).resolve()
    texts = [path for path in paths if not path.resolve().is_relative_to(written)]
    if not texts:
        raise ValueError(
            f"expected text files outside of --output_dir at {', '.join(map(repr, patterns))}, got none"
        )
    return [_read_text(path) for path in texts]


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got {error}") from error


def _stream(spec: str, column: str, characters: int) -> list[str]:
    """The first `characters` of a data set's training split."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError("--dataset needs the package: pip install datasets") from error
    name, _, config = spec.partition(":")
    documents, length = [], 0
    try:
        for row in load_dataset(name, config or None, split="train", streaming=True):
            if column not in row:
                raise ValueError(f"expected --dataset_column one of {sorted(row)}, got {column!r}")
            text = row[column]
            if text is None:
                continue
            if not isinstance(text, str):
                raise ValueError(f"expected text in column {column!r}, got {type(text).__name__}")
            documents.append(text)
            length += len(text)
            if length >= characters:
                break
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"--dataset {spec}: {error}") from error
    return documents


def load_tokenizer(args, corpus: Corpus) -> PreTrainedTokenizerBase:
    if not args.tokenizer:
        return train_tokenizer(corpus.train, args.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--tokenizer {args.tokenizer}: expected an end-of-text token, got none")
    return tokenizer


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text can be encoded and decodes to itself."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(f"expected --vocab_size > {len(alphabet)}, got {vocab_size}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    bpe.train_from_iterator(_first(documents, TOKENIZER_CHARACTERS), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def _first(documents: list[str], characters: int) -> Iterator[str]:
    for document in documents:
        if characters <= 0:
            return
        yield document
        characters -= len(document)


def pack(documents: list[str], tokenizer: PreTrainedTokenizerBase, seq_length: int) -> np.ndarray:
    """One stream of tokens, an end-of-text after every document, cut into (n, seq_length)."""
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    stream = [np.empty(0, dtype)]
    for i in range(0, len(documents), 1000):
        encoded = tokenizer(documents[i : i + 1000], add_special_tokens=False, verbose=False)
        for ids in encoded["input_ids"]:
            stream.append(np.array([*ids, tokenizer.eos_token_id], dtype))
    tokens = np.concatenate(stream)
    n = len(tokens) // seq_length
    return tokens[: n * seq_length].reshape(n, seq_length)


class Blocks(torch.utils.data.Dataset):
    """Samples `start` to `start + samples` of a run over `blocks` (n, seq_length).

    With a seed, sample i is a function of (blocks, seed, i) alone: every pass over the blocks has
    its own order, and the two phases of a run see the data as one phase would. Without, in order.
    """

    def __init__(self, blocks: np.ndarray, start: int, samples: int, seed: int | None = None):
        self.blocks, self.start, self.samples, self.seed = blocks, start, samples, seed
        self._epoch, self._order = -1, None

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        epoch, row = divmod(self.start + i, len(self.blocks))
        if self.seed is not None:
            if epoch != self._epoch:
                rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
                self._epoch, self._order = epoch, rng.permutation(len(self.blocks))
            row = self._order[row]
        ids = torch.from_numpy(self.blocks[row].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def training_blocks(args, corpus: Corpus, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of the training and the validation split. ValueError if the text is too short."""
    train = pack(corpus.train, tokenizer, args.seq_length)
    validation = pack(corpus.validation, tokenizer, args.seq_length)
    if len(train) < args.batch_size:
        raise ValueError(
            f"too short a corpus: expected at least {args.batch_size * args.seq_length} training "
            f"tokens (batch_size {args.batch_size} x seq_length {args.seq_length}), got "
            f"{train.size} from {corpus.source}: add text, or lower --batch_size or --seq_length"
        )
    if len(validation) == 0:
        raise ValueError(
            f"too short a corpus: expected at least {args.seq_length} validation tokens, got fewer "
            f"from {corpus.source}: add text, give --validation_files, or lower --seq_length"
        )
    keep = max(1, args.eval_tokens // args.seq_length)
    every = max(1, len(validation) // keep)  # spread over the whole text
    return train, validation[::every][:keep]
