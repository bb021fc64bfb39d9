"""relora-train's data: corpus, splits, tokenizer, packing, order."""

import itertools
import json

import numpy as np
import pytest

pytest.importorskip("transformers")

from train_runs import flags, words
from transformers import AutoTokenizer

from relora_kernels.train import cli, data
from relora_kernels.train.args import parse_args


def test_embedded_corpus_repeats_and_its_splits_are_disjoint():
    first, second = (data.load_corpus(parse_args([])) for _ in range(2))
    assert first.sha256 == second.sha256
    assert not set(first.train) & set(first.validation)
    held_out = sum(map(len, first.validation))
    assert 0.05 <= held_out / (held_out + sum(map(len, first.train))) < 0.08


def test_hash_depends_on_contents_and_boundaries():
    def sha(train, validation):
        return data.Corpus("", train, validation).sha256

    hashes = [sha(["ab"], []), sha(["a", "b"], []), sha([], ["ab"]), sha(["ba"], [])]
    assert len(set(hashes)) == 4


def test_split_keeps_every_line_of_a_single_document():
    document = words(400)
    train, validation = data.split([document])
    assert train and validation and not set(train) & set(validation)
    lines = sorted(document.splitlines())
    assert sorted(line for d in train + validation for line in d.splitlines()) == lines


def test_explicit_validation_is_kept_out_of_training(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(words(50, ord(name)))
    args = parse_args(["--train_files", str(tmp_path), "--validation_files", str(tmp_path / "b")])
    corpus = data.load_corpus(args)
    assert corpus.validation == [(tmp_path / "b").read_text()]
    assert corpus.train == [(tmp_path / n).read_text() for n in "ac"]


def test_a_name_that_exists_is_no_pattern(tmp_path):
    for name in ("report [final].txt", "notes[1].txt", "notes1.txt"):
        (tmp_path / name).write_text(name)
    for pattern, found in {
        "report [final].txt": ["report [final].txt"],
        "notes[1].txt": ["notes[1].txt"],
        "notes[1-9].txt": ["notes1.txt"],
        "notes*": ["notes1.txt", "notes[1].txt"],
    }.items():
        assert data._read([str(tmp_path / pattern)], "run") == found


@pytest.mark.parametrize("pattern", ["", "**/*", "run/../**/*"])
def test_a_run_among_its_texts_reads_none_of_its_files(pattern, tmp_path):
    run = tmp_path / "notes" / "run"
    (run / "final").mkdir(parents=True)
    (run.parent / "a.txt").write_text("a")
    (run.parent / "runaway").write_text("b")
    (run / "metrics.jsonl").write_text("no text")
    (run / "final" / "model.safetensors").write_bytes(b"\xff")
    (run.parent / "loop").symlink_to("loop")
    (run.parent / "empty").mkdir()
    # The last two are what a shell passes for notes/*.
    patterns = [str(path) for path in (run.parent / pattern, run.parent / "empty", run)]
    assert sorted(data._read(patterns, str(run))) == ["a", "b"]
    elsewhere = tmp_path / "elsewhere"
    run.rename(elsewhere)
    run.symlink_to(elsewhere)
    assert sorted(data._read(patterns, str(run))) == ["a", "b"]
    with pytest.raises(
        ValueError, match="text files outside of --output_dir at .*final', got none"
    ):
        data._read([str(run / "final")], str(run))


def test_validation_on_all_of_the_text_is_refused(tmp_path):
    (tmp_path / "a").write_text(words(50))
    flags = ["--train_files", str(tmp_path), "--validation_files", str(tmp_path)]
    with pytest.raises(ValueError, match="not in --validation_files, got none of 1"):
        data.load_corpus(parse_args(flags))


def test_dataset_is_streamed_until_there_is_enough(tmp_path):
    pytest.importorskip("datasets")
    rows = [json.dumps({"body": f"{i} " + words(20, i)}) for i in range(200)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    tiny = ["--steps", "10", "--batch_size", "2", "--micro_batch_size", "2", "--seq_length", "8"]
    tiny += ["--warm_start_steps", "0", "--warmup_steps", "0", "--eval_tokens", "8"]
    named = ["--dataset", str(tmp_path), "--dataset_column"]
    corpus = data.load_corpus(parse_args([*tiny, *named, "body"]))
    taken = len(corpus.train) + len(corpus.validation)
    assert 2 <= taken < 200
    with pytest.raises(ValueError, match=r"one of \['body'\], got 'text'"):
        data.load_corpus(parse_args([*tiny, *named, "text"]))
    numbered = [
        json.dumps({"body": None if i % 3 == 0 else words(20, i), "n": i}) for i in range(200)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(numbered))
    assert all(data.load_corpus(parse_args([*tiny, *named, "body"])).train)
    with pytest.raises(ValueError, match="text in column 'n', got int"):
        data.load_corpus(parse_args([*tiny, *named, "n"]))


def test_tokenizer_round_trips_any_text(tmp_path):
    tokenizer = data.train_tokenizer([words(200)], 300)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for sample in ("a b c.\n", "  def f(x):\n\treturn x  \n", "naïve 数学 \U0001f600", ""):
        ids = tokenizer(sample)["input_ids"]
        assert tokenizer.decode(ids) == sample and loaded(sample)["input_ids"] == ids
    assert loaded.eos_token == data.EOS


def test_a_tokenizer_of_ones_own(tmp_path):
    data.train_tokenizer([words(200)], 270).save_pretrained(tmp_path)
    args = parse_args(["--tokenizer", str(tmp_path)])
    corpus = data.Corpus("", [words(5)], [])
    assert data.load_tokenizer(args, corpus).eos_token == data.EOS
    config = tmp_path / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))
    with pytest.raises(ValueError, match="expected an end-of-text token, got none"):
        data.load_tokenizer(args, corpus)


def test_pack_ends_every_document_and_loses_only_the_tail():
    tokenizer = data.train_tokenizer([words(200)], 300)
    documents = [words(5, i) for i in range(3)]
    stream = list(
        itertools.chain.from_iterable(
            [*tokenizer(d)["input_ids"], tokenizer.eos_token_id] for d in documents
        )
    )
    blocks = data.pack(documents, tokenizer, 16)
    assert blocks.flatten().tolist() == stream[: len(stream) // 16 * 16]


def test_blocks_are_a_function_of_seed_and_sample_alone():
    rows = np.arange(20).reshape(10, 2)

    def read(start, samples, seed=0):
        blocks = data.Blocks(rows, start, samples, seed)
        return [blocks[i]["input_ids"][0].item() for i in range(len(blocks))]

    whole = read(0, 30)
    assert read(0, 7) + read(7, 23) == whole
    epochs = [whole[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(e) == list(range(0, 20, 2)) for e in epochs)
    assert epochs[0] != epochs[1] and read(0, 10, seed=1) != epochs[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [  # case 46 of test_reliability.py's list
        ("", "expected at least 64 training tokens (batch_size 4 x seq_length 16), got 0"),
        ("a b c d", "expected at least 64 training tokens"),
        ("\n".join(["a b c d e f g h i j"] * 3), "expected at least"),
        (b"\xff\xfe", "expected UTF-8 text"),
        (None, "expected text files at"),
    ],
)
def test_bad_corpus_is_refused(content, message, tmp_path, capsys):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert cli.main(flags(path, tmp_path / "out")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_long_line_and_repeated_lines_are_text_enough():
    for document in ("word " * 4000, "the quick brown fox\n" * 1000):
        train, validation = data.split([document])
        assert sum(map(len, train)) > 10 * sum(map(len, validation)) > 0
