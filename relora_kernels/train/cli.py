"""relora-train: a full-rank warm start, then ReLoRA, with Hugging Face's Trainer as the engine.

`Run.train` shows how the library is used. The rest of the package is what else a run needs: args,
data, metrics, output (the folder), report.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import sys
from pathlib import Path

import accelerate
import numpy as np
import torch
import transformers
import yaml
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import relora_kernels
from relora_kernels import (
    ReLoRaConfig,
    ReLoRaSchedule,
    apply_relora,
    cosine_with_warmup,
    files,
    lora_parameters,
    merge_and_reinit,
    merge_and_unload,
    ranks,
    reset_optimizer,
)
from relora_kernels.model import relora_layers
from relora_kernels.optimizer import MOMENTS
from relora_kernels.reference import philox

from . import checkpoint, report
from .args import WARM_START, Args, is_main_process, parse_args, world_size
from .callback import ReLoRaCallback, SkipNonFiniteCallback, StopOnSignalCallback
from .data import Blocks, load_corpus, load_tokenizer, training_blocks
from .diagnostics import DiagnosticCallback
from .metrics import MetricsCallback, Progress, json_lines, tensorboard
from .output import RunFolder, write_json_lines
from .spectrum import SpectrumCallback, figures, measure
from .trainer import ReLoRaTrainer


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # the terminal's encoding may lack a sample's text
        sys.stdout.reconfigure(errors="backslashreplace")
    transformers.utils.logging.disable_progress_bar()  # Progress is the only bar
    folder = RunFolder(args.output_dir)
    with contextlib.closing(folder):
        return _train(args, folder)


def _train(args: Args, folder: RunFolder) -> int:
    try:
        run = Run(args, folder)
    except (ValueError, FloatingPointError, OSError, relora_kernels.BackendUnavailable) as error:
        print(f"relora-train: error: {error}", file=sys.stderr)
        return 2
    try:
        model = run.train()
    except checkpoint.OtherRun as error:
        print(f"relora-train: error: --resume: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError, relora_kernels.BackendUnavailable) as error:
        print(f"relora-train: error: {error}", file=sys.stderr)
        return 1
    try:
        if is_main_process():
            with files.disk_errors():
                run.finish(model)
    except OSError as error:
        print(
            f"relora-train: error: {error}; all steps are taken: --resume goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("relora-train: interrupted; all steps are taken: --resume goes on", file=sys.stderr)
        return 130
    return 0


class _InOrder(ReLoRaTrainer):
    """Samples in order: Blocks has shuffled them. (train_sampling_strategy came in transformers 5.2.)"""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Run:
    """One run: its settings, folder and data. Construction raises ValueError for bad input."""

    def __init__(self, args: Args, folder: RunFolder):
        gpus = torch.cuda.device_count()
        if gpus > 1 and world_size() == 1:
            raise ValueError(
                f"expected one process per GPU, got one for {gpus}: start with torchrun "
                f"--nproc-per-node {gpus} -m relora_kernels.train, or set CUDA_VISIBLE_DEVICES=0"
            )
        for other in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
            if os.environ.get(f"ACCELERATE_USE_{other}", "false").lower() in ("1", "true", "yes"):
                raise ValueError(
                    f"expected no ACCELERATE_USE_{other}, got {os.environ[f'ACCELERATE_USE_{other}']}: its "
                    f"copies of the weights cannot be merged into; start with torchrun, and --sharding "
                    f"full to save memory"
                )
        # --bf16 and config.yaml decide, even under `accelerate launch --mixed_precision`.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if args.bf16 else "no"
        self.args, self.folder = args, folder
        self.folder.check(args.resume, args.overwrite)

        corpus = load_corpus(args)
        self.tokenizer = load_tokenizer(args, corpus)
        self.blocks, self.validation = training_blocks(args, corpus, self.tokenizer)
        # Besides the corpus's hash: another tokenizer version may give other tokens for the same text.
        self.tokens_sha256 = hashlib.sha256(np.ascontiguousarray(self.blocks)).hexdigest()
        self.prompt = corpus.validation[0][:40]
        self.corpus = {
            "source": corpus.source,
            "sha256": corpus.sha256,
            "documents": [len(corpus.train), len(corpus.validation)],
            "tokens": [self.blocks.size, self.validation.size],
        }
        if args.relora_steps > 0:
            self._try_relora()
        if args.warm_start_from and not args.resume:
            self._check_warm_start()
        self._claim_folder()
        if args.warm_start_from and args.resume and not self.resumed:
            self._check_warm_start()
        self.guard, self.stop = SkipNonFiniteCallback(), StopOnSignalCallback()
        self.sinks = []
        if is_main_process():
            self.progress = Progress(args.steps)
            self.sinks = [json_lines(self.folder.metrics), self.progress]
            # A resumed run hides what the interrupted one wrote for the steps that it repeats.
            purge = self._first_step() if args.resume else None
            if writer := tensorboard(self.folder.tensorboard, purge):
                self.sinks.append(writer)
            else:
                print("tensorboard is not installed: metrics go to metrics.jsonl alone")

    def _check_warm_start(self):
        """ValueError unless args.warm_start_from holds a finished warm start with these settings."""
        donor, given = RunFolder(self.args.warm_start_from), "--warm_start_from"
        try:
            before = yaml.safe_load(donor.config.read_text(encoding="utf-8"))
            before = {name: before.get(name) for name in WARM_START}
            corpus = donor.corpus_record()["sha256"]
        except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
            raise ValueError(f"{given}: expected the folder of a run, got {error}") from error
        now = self.args.settings()
        wrong = [
            f"{name}: expected {now[name]}, got {before[name]}"
            for name in WARM_START
            if now[name] != before[name]
        ]
        if corpus != self.corpus["sha256"]:
            wrong.append(f"corpus: expected {self.corpus['sha256'][:12]}, got {corpus[:12]}")
        found = donor.last_checkpoint("warm_start")
        if found is None or _step_of(found) != self.args.warm_start_steps:
            wrong.append(
                f"expected its checkpoint at step {self.args.warm_start_steps}, got {found}"
            )
        if wrong:
            raise ValueError(f"{given} {donor.root}: " + "; ".join(wrong))

    def _try_relora(self):
        """Try it on the meta device: a bad target is reported now, not after the warm start."""
        with torch.device("meta"):
            apply_relora(LlamaForCausalLM(self._llama_config()), self._relora_config())

    def _rehearse(self):
        """Forward, backward, merge and reset of one small layer: whatever a named backend cannot do is
        reported now, too."""
        args, width = self.args, self.args.hidden_size
        model = torch.nn.Sequential(torch.nn.Linear(width, width, bias=False)).to(self.device)
        apply_relora(model, dataclasses.replace(self._relora_config(), target_modules=["0"]))
        factors = list(lora_parameters(model))
        optimizer = torch.optim.AdamW(factors)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=args.bf16):
            y = model(torch.ones(8, width, device=self.device)).sum()
        for factor, gradient in zip(factors, torch.autograd.grad(y, factors)):
            optimizer.state[factor] = {key: gradient.clone() for key in MOMENTS}
        merge_and_reinit(model)
        if args.reset_mode != "none":
            reset_optimizer(optimizer, factors, args.reset_mode, args.reset_ratio)

    def _claim_folder(self):
        state = accelerate.PartialState(cpu=not torch.cuda.is_available())
        self.device = state.device
        if self.args.relora_steps > 0:
            self._rehearse()
        if is_main_process():
            self.folder.lock()
            # Again: from here on the lock keeps others from writing.
            self.folder.check(self.args.resume, self.args.overwrite)
        state.wait_for_everyone()  # every process has checked the folder
        if self.args.resume:
            before = self.folder.corpus_record()
            if before["sha256"] != self.corpus["sha256"]:
                raise ValueError(
                    f"--resume: expected the corpus {before['sha256'][:12]} ({before['source']}), "
                    f"got {self.corpus['sha256'][:12]} ({self.corpus['source']})"
                )
        elif is_main_process():
            self.folder.create()
            files.write_text(self.folder.corpus, json.dumps(self.corpus, indent=2) + "\n")
            files.write_text(self.folder.config, self.args.to_yaml())
        state.wait_for_everyone()
        self.resumed = self._find_checkpoints() if self.args.resume else {}

    def _find_checkpoints(self) -> dict[str, str]:
        """The last valid checkpoint of each phase that has one. Rank 0 looks and tells the others."""
        phases, steps, damaged = ("relora", "warm_start"), [-1, -1], 0
        if is_main_process():
            found = [self.folder.last_checkpoint(phase) for phase in phases]
            steps = [_step_of(path) if path else -1 for path in found]
            damaged = not any(found) and any(
                checkpoint.any_in(self.folder.phase(phase)) for phase in phases
            )
        *steps, damaged = ranks.maximum([*steps, int(damaged)])
        if damaged:
            raise ValueError(
                f"--resume: expected a valid checkpoint in {self.folder.checkpoint}, got damaged ones "
                "alone (see above); --overwrite starts anew"
            )
        if max(steps) < 0 and is_main_process():
            print(f"no checkpoint in {self.folder.checkpoint} yet: starting from the first step")
            self.folder.forget_rows_after("warm_start", -1)
        return {
            phase: str(self.folder.phase(phase) / f"checkpoint-{step}")
            for phase, step in zip(phases, steps)
            if step >= 0
        }

    def _first_step(self) -> int:
        """The first step that this process will take, counted over both phases."""
        if path := self.resumed.get("relora"):
            return self.args.warm_start_steps + _step_of(path) + 1
        path = self.resumed.get("warm_start")
        return _step_of(path) + 1 if path else 0

    def train(self) -> LlamaForCausalLM:
        """Run the warm start and ReLoRA, or what is left of them; returns the model with A and B."""
        args = self.args
        if args.cpu_threads:
            torch.set_num_threads(args.cpu_threads)
        set_seed(args.seed)
        model = LlamaForCausalLM(self._llama_config())
        model.to(self.device)

        if args.warm_start_from and not self.resumed:
            self._take_warm_start(model)
        elif args.warm_start_steps > 0 and "relora" not in self.resumed:
            self._shard(model)
            optimizer = _adamw(model, args.warm_start_learning_rate)
            cosine = cosine_with_warmup(args.warmup_steps, args.steps, args.min_lr_ratio)
            self._fit("warm_start", model, optimizer, LambdaLR(optimizer, cosine))
            model = self._unprepared(model)

        if args.relora_steps > 0:
            apply_relora(model, self._relora_config())
            self._shard(model)
            optimizer = _adamw(model, args.learning_rate)  # a fresh one: A and B are new
            schedule = ReLoRaSchedule(
                model,
                optimizer,
                cosine_with_warmup(args.warmup_steps, args.relora_steps, args.min_lr_ratio),
                restart_every=args.cycle_steps,
                restart_warmup_steps=args.restart_warmup_steps,
                total_steps=args.relora_steps,
                reset_mode=None if args.reset_mode == "none" else args.reset_mode,
                reset_ratio=args.reset_ratio,
                paired=args.paired,
            )
            self._fit("relora", model, optimizer, schedule.lr_scheduler, schedule)
        return self._unprepared(model) if args.sharding == "full" else model

    def _take_warm_start(self, model: LlamaForCausalLM) -> None:
        """Copy the weights and metrics rows of the run that args.warm_start_from names."""
        donor = RunFolder(self.args.warm_start_from)
        found = donor.last_checkpoint("warm_start")
        checkpoint.load_model(model, checkpoint.load_tensors(Path(found) / "model.safetensors"))
        if is_main_process():
            rows = [row for row in donor.rows() if row["phase"] == "warm_start"]
            write_json_lines(self.folder.metrics, rows)

    def _shard(self, model: LlamaForCausalLM) -> None:
        if self.args.sharding == "full" and torch.distributed.is_initialized():
            for block in model.model.layers:
                fully_shard(block)
            fully_shard(model)

    def _unprepared(self, model: LlamaForCausalLM) -> LlamaForCausalLM:
        """The same weights in a new model, unsharded on every rank: Accelerate marks a model that it
        has prepared, and gives it neither autocast nor DDP a second time."""
        fresh = LlamaForCausalLM(model.config)
        if relora_layers(model, required=False):
            apply_relora(fresh, self._relora_config())
        fresh.load_state_dict(checkpoint.gather_model(model), assign=True)
        for name, parameter in model.named_parameters():
            fresh.get_parameter(name).requires_grad_(parameter.requires_grad)
        return fresh.to(self.device)

    def _fit(self, phase, model, optimizer, lr_scheduler, schedule=None):
        """Run one phase with Trainer, from its last checkpoint if the run is resumed."""
        args, resumed = self.args, self.resumed.get(phase)
        first = 0 if phase == "warm_start" else args.warm_start_steps
        steps = args.relora_steps if phase == "relora" else args.warm_start_steps
        rows = self.folder.rows()
        if resumed and is_main_process():
            rows = self.folder.forget_rows_after(phase, first + _step_of(resumed))
        relora = []
        if schedule:  # SpectrumCallback first: it reads the factors that a restart replaces
            restart = DiagnosticCallback if args.diagnostics else ReLoRaCallback
            relora = [SpectrumCallback(schedule, self.folder.spectrum), restart(schedule)]
        metrics = MetricsCallback(
            self.sinks,
            phase,
            first_step=first,
            tokens_per_step=args.batch_size * args.seq_length,
            seconds=rows[-1]["seconds"] if rows else 0.0,
            schedule=schedule,
            guard=self.guard,
            diagnostics=relora[-1] if relora and args.diagnostics else None,
        )
        self.guard.first_step = self.stop.first_step = first
        self.guard.in_a_row = 0
        trainer = _InOrder(
            model=model,
            args=self._training_arguments(phase, steps, first == 0 and not resumed),
            train_dataset=Blocks(
                self.blocks, first * args.batch_size, steps * args.batch_size, args.seed
            ),
            eval_dataset=Blocks(self.validation, 0, len(self.validation)),
            data_collator=default_data_collator,
            processing_class=self.tokenizer,
            optimizers=(optimizer, lr_scheduler),
            callbacks=[self.guard, *relora, metrics, self.stop],
            fingerprint={"corpus": self.corpus["sha256"], "tokens": self.tokens_sha256},
        )
        trainer.remove_callback(PrinterCallback)  # MetricsCallback reports the same, better
        # Trainer has seeded all ranks alike, which would give all of them the same dropout mask.
        set_seed(args.seed if ranks.index() == 0 else _seed_of_rank(args.seed))
        trainer.train(resume_from_checkpoint=resumed)
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        trainer.accelerator.free_memory()

    def _llama_config(self) -> LlamaConfig:
        args = self.args
        return LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=args.intermediate_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=args.num_heads,
            max_position_embeddings=args.seq_length,
            tie_word_embeddings=False,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )

    def _relora_config(self) -> ReLoRaConfig:
        args = self.args
        return ReLoRaConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=args.targets,
            weight_dtype=torch.bfloat16 if args.bf16 else None,
            merge_rounding=args.merge_rounding,
            lora_dtype=getattr(torch, args.lora_dtype) if args.lora_dtype else None,
            seed=args.seed,
        )

    def _training_arguments(self, phase: str, steps: int, eval_on_start: bool) -> TrainingArguments:
        args, on_gpu = self.args, torch.cuda.is_available()
        return TrainingArguments(
            output_dir=str(self.folder.phase(phase)),
            max_steps=steps,
            per_device_train_batch_size=args.device_batch_size,
            per_device_eval_batch_size=args.device_batch_size,
            gradient_accumulation_steps=args.batch_size // (args.device_batch_size * world_size()),
            max_grad_norm=args.max_grad_norm,
            ddp_find_unused_parameters=False,
            bf16=args.bf16,
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            seed=args.seed,
            remove_unused_columns=False,
            logging_steps=args.log_every,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # a NaN loss is shown, not averaged away
            eval_strategy="steps",
            eval_steps=args.eval_every,
            eval_on_start=eval_on_start,
            prediction_loss_only=True,
            save_strategy="steps",
            save_steps=args.save_every,
            save_total_limit=2,
            report_to="none",
            disable_tqdm=True,
        )

    def finish(self, model: LlamaForCausalLM) -> None:
        """Write the merged model first, then plots, sample and summary."""
        self.progress.close()
        args, folder, rows = self.args, self.folder, self.folder.rows()
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if args.relora_steps > 0:
            # In fp32 the residual of bf16 merges goes into the weights instead of being dropped.
            merge_and_unload(model.float())
        self._export(model)
        spectrum = measure(model, folder.spectrum) if args.relora_steps > 0 else None
        speeds = sorted(r["tokens_per_second"] for r in rows if "tokens_per_second" in r)
        memory = [r["peak_memory"] for r in rows if "peak_memory" in r]
        tokens = args.steps * args.batch_size * args.seq_length
        losses, sample = report.losses(rows), None
        if losses["eval_loss_final"] is not None:  # a diverged model cannot be sampled
            sample = report.sample_text(model, self.tokenizer, self.prompt, args.seed)
        summary = {
            "model": f"Llama, {args.preset} preset",
            "parameters": sum(p.numel() for p in model.parameters()),
            "trainable_parameters": trainable,
            "steps": args.steps,
            "restarts": sum("restart" in r for r in rows),
            "skipped_steps": sum("skipped" in r for r in rows),
            "tokens": tokens,
            "epochs": tokens / self.blocks.size,
            **losses,
            "update_rank": figures(spectrum) if spectrum else None,
            "train_seconds": rows[-1]["seconds"] if rows else None,
            "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
            "peak_memory_mib": max(memory) if memory else None,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "corpus": f"{self.corpus['source']}, sha256 {self.corpus['sha256'][:12]}",
            "corpus_record": self.corpus,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "relora_kernels": relora_kernels.__version__,
            },
            "settings": args.settings(),
            "sample": sample,
        }
        report.plot_metrics(rows, folder.plots, spectrum)
        files.write_text(folder.summary, json.dumps(summary, indent=2) + "\n")
        print(f"\n{report.table(summary)}\n\nsample\n{summary['sample'] or '-'}\n")
        print(f"written to {folder.root}")

    def _export(self, model) -> None:
        """Write the merged model: final/ is either complete or absent."""
        temporary = self.folder.final.with_name("final.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # left by a process killed here
        model.save_pretrained(temporary)
        self.tokenizer.save_pretrained(temporary)
        files.sync(*temporary.rglob("*"), temporary)
        if self.folder.final.exists():
            shutil.rmtree(self.folder.final)
        temporary.rename(self.folder.final)
        files.sync(self.folder.root)


def _adamw(model, learning_rate: float) -> torch.optim.AdamW:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        parameters, learning_rate, weight_decay=0.0, fused=torch.cuda.is_available()
    )


def _seed_of_rank(seed: int) -> int:
    return philox.derive_seed("rank", seed, ranks.index()) % 2**32


def _step_of(path: str) -> int:
    return int(path.rpartition("-")[2])
