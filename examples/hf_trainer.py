"""A causal language model trained with Hugging Face's Trainer; ReLoRA is three statements, marked [ReLoRA].

    python examples/hf_trainer.py --train_file notes.txt --output_dir run --max_steps 400 --save_steps 200

Everything else is what such a script has anyway, except that the Trainer gets the schedule's
learning rate instead of its own. Nothing is downloaded: a byte-level tokenizer is trained on the text,
and the model starts from scratch unless --model_name_or_path names one (ReLoRA wants a model that has
seen some full-rank training). Resume with --resume_from_checkpoint run/checkpoint-200.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    get_scheduler,
    set_seed,
)

from relora_kernels import (
    ReLoRaConfig,
    ReLoRaSchedule,
    apply_relora,
    merge_and_unload,
)
from relora_kernels.train import ReLoRaCallback


@dataclass
class ScriptArguments:
    train_file: str = field(metadata={"help": "UTF-8 text to train on."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A causal LM to continue from. Unset: a small new Llama."}
    )
    block_size: int = field(default=128, metadata={"help": "Tokens of one sequence."})
    vocab_size: int = field(default=1024, metadata={"help": "Of the tokenizer that is trained."})
    hidden_size: int = field(default=128, metadata={"help": "Width of a new model."})
    num_layers: int = field(default=4, metadata={"help": "Blocks of a new model."})
    lora_r: int = field(default=32, metadata={"help": "Rank of one cycle."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before A."})
    restart_every: int = field(default=100, metadata={"help": "Optimizer steps between restarts."})


def load_tokenizer(args: ScriptArguments):
    if args.model_name_or_path:
        return AutoTokenizer.from_pretrained(args.model_name_or_path)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    options = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train([args.train_file], options)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>")


def load_model(args: ScriptArguments, tokenizer):
    if args.model_name_or_path:
        return AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=8 * args.hidden_size // 3,
        num_hidden_layers=args.num_layers,
        num_attention_heads=4,
        max_position_embeddings=args.block_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def load_blocks(args: ScriptArguments, tokenizer) -> tuple[list[dict], list[dict]]:
    """The text as blocks of tokens; one in twenty is held out."""
    ids = tokenizer(Path(args.train_file).read_text(encoding="utf-8"))["input_ids"]
    blocks = torch.tensor(ids[: len(ids) // args.block_size * args.block_size])
    rows = [{"input_ids": block, "labels": block} for block in blocks.view(-1, args.block_size)]
    return [r for i, r in enumerate(rows) if i % 20], rows[::20]


def main() -> None:
    args, training = HfArgumentParser(
        (ScriptArguments, TrainingArguments)
    ).parse_args_into_dataclasses()
    set_seed(training.seed)
    tokenizer = load_tokenizer(args)
    train, held_out = load_blocks(args, tokenizer)
    model = load_model(args, tokenizer)

    apply_relora(model, ReLoRaConfig(args.lora_r, lora_dropout=args.lora_dropout))  # [ReLoRA]
    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(training)
    optimizer = optimizer_class(
        [p for p in model.parameters() if p.requires_grad],
        weight_decay=training.weight_decay,
        **settings,
    )
    steps, every = training.max_steps, args.restart_every
    if steps < 1:
        raise SystemExit(f"expected --max_steps >= 1, by which restarts are counted, got {steps}")
    base = get_scheduler(
        training.lr_scheduler_type, optimizer, training.get_warmup_steps(steps), steps,
        training.lr_scheduler_kwargs,
    )  # fmt: skip
    schedule = ReLoRaSchedule(  # [ReLoRA]
        model, optimizer, base, every, every // 5, total_steps=steps
    )
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        optimizers=(optimizer, schedule.lr_scheduler),
        callbacks=[ReLoRaCallback(schedule)],  # [ReLoRA]
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)

    loss = trainer.evaluate()["eval_loss"]
    print(f"restarts {schedule.cycle}, held-out loss {loss:.4f}, perplexity {math.exp(loss):.1f}")
    merge_and_unload(model)  # plain nn.Linear modules: an ordinary Hugging Face checkpoint
    trainer.save_model(str(Path(training.output_dir) / "final"))


if __name__ == "__main__":
    main()
