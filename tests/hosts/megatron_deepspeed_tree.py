"""Megatron-DeepSpeed's own tree: its GPT-2 345M script scaled down, tied, no flush: trains, saves, resumes, exports.

``python -m tests.hosts.megatron_deepspeed_tree --tree CHECKOUT --stages 2 --out NEW``, on a CPU, some minutes. The
checkout stays as it is: a copy gets what its code needs on a CPU and with today's DeepSpeed (`FOR_A_CPU`; nothing of
noflush's). Arguments are those of the tree's ``examples/pretrain_gpt_distributed_with_mp.sh`` but for sizes, dropout,
parallelism and precision: float32, or with ``--fp16`` the script's own, under ZeRO-1. What must hold ends it with an
error where it does not:

- the run trains (its loss falls), evaluates, and saves in the middle and at the end;
- resumed from the middle it has the losses of the run that went on, digit by digit (dropout off: Megatron itself does
  not resume its random numbers);
- the tree's ``deepspeed_to_megatron.py`` makes a checkpoint for one rank of it, whose tied weight is one, and to which
  the tree's `GPTModel`, which knows neither DeepSpeed nor noflush, gives the validation loss that the run printed.

Beside it runs the flush twin of the same arguments, for the eye.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from torch.utils.cpp_extension import include_paths

from noflush.demo.port import held_port

ROOT = Path(__file__).parents[2]
ITERATIONS, SAVED, FALLS_FROM = 30, 15, 2
LIMIT_S = 900
SIZES = {
    "--num-layers": "4",
    "--hidden-size": "64",
    "--num-attention-heads": "4",
    "--seq-length": "64",
    "--max-position-embeddings": "64",
    "--train-iters": str(ITERATIONS),
    "--lr-decay-iters": str(ITERATIONS),
    "--lr": "0.002",
    "--min-lr": "0.0002",
    "--log-interval": "1",
    "--save-interval": str(SAVED),
    "--eval-interval": "1000",
    "--eval-iters": "2",
    "--attention-dropout": "0.0",
    "--hidden-dropout": "0.0",
}
"""In place of the script's; the rate grows as the model shrinks."""
ON_A_CPU = ["--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion", "--distributed-backend", "gloo"]
FOR_A_CPU = {
    "megatron/training.py": [
        (r"^from megatron\.model\.vision\.knn_monitor import .*$", ""),  # wants torchvision
        (r"^from deepspeed\.compression\.compress import .*$", ""),  # not in DeepSpeed any more
    ],
    "megatron/initialize.py": [(r"args\.rank % device_count$", "int(os.environ['LOCAL_RANK'])")],
    "megatron/model/transformer.py": [(r"(query_layer|key_layer|value_layer)\.view\(", r"\1.reshape(")],
}
"""What the tree at commit 4efb479d needs on a CPU: by file, lines and what becomes of them."""

_LOSS = re.compile(r"iteration\s+(\d+)/.*?lm loss: (\S+)")
_VALIDATION = re.compile(r"validation loss at .*?lm loss value: (\S+)")


class Checkout:
    """A copy of the tree that runs on a CPU, in a folder of its own with data, logs and saves.

    Raises:
        SystemExit: a line that `FOR_A_CPU` names is not there, so that the commit is another; a program failed.
    """

    def __init__(self, tree: Path, folder: Path, fp16: bool):
        folder.mkdir(parents=True)
        self.folder, self.tree, self.fp16 = folder.resolve(), folder.resolve() / "tree", fp16
        shutil.copytree(tree, self.tree, ignore=shutil.ignore_patterns(".git"))
        for name, changes in FOR_A_CPU.items():
            text = (self.tree / name).read_text()
            for line, becomes in changes:
                text, count = re.subn(line, becomes, text, flags=re.MULTILINE)
                if not count:
                    raise SystemExit(f"{name} has no {line}: the tree is another than that of commit 4efb479d")
            (self.tree / name).write_text(text)
        vocabulary = self.tree / "examples_deepspeed/rebase"
        self.vocabulary = [f"--vocab-file={vocabulary}/gpt2-vocab.json", f"--merge-file={vocabulary}/gpt2-merges.txt"]
        self.environment = os.environ | {
            "PYTHONPATH": str(self.tree),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            # Its checkpoints hold its arguments, an object.
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
            # Its data helpers are built as the run starts, and ask for pybind11, whose headers torch has.
            "CPATH": os.pathsep.join([*include_paths("cpu"), sysconfig.get_path("include")]),
        }

    def write_data(self) -> None:
        """The tree's own documents, tokenized by noflush's preprocess_data.py, whose files the tree reads."""
        lines = [json.dumps({"text": file.read_text(errors="replace")}) for file in sorted(self.tree.rglob("*.md"))]
        text = self.folder / "text.jsonl"
        text.write_text("\n".join(lines))
        command = [sys.executable, str(ROOT / "launch/preprocess_data.py"), f"--input={text}", *self.vocabulary]
        command += [f"--output-prefix={self.folder}/data", "--tokenizer-type=GPT2BPETokenizer", "--append-eod"]
        subprocess.run(command, check=True)

    def arguments(self, fp16: bool) -> list[str]:
        """GPT_ARGS of the tree's 345M script with `SIZES`, and the data."""
        script = (self.tree / "examples/pretrain_gpt_distributed_with_mp.sh").read_text()
        (listed,) = re.findall(r'^GPT_ARGS="(.*?)"', script, flags=re.MULTILINE | re.DOTALL)
        options: dict[str, list[str]] = {}
        for word in shlex.split(listed.replace("\\\n", " ")):
            if word.startswith("--"):
                options[word] = []
            else:
                options[next(reversed(options))].append(word)
        for gone in ("--sequence-parallel", "--tensor-model-parallel-size", "--pipeline-model-parallel-size"):
            del options[gone]
        if not fp16:
            del options["--fp16"]
        options |= {name: [value] for name, value in SIZES.items()}
        words = [word for name, values in options.items() for word in (name, *values)]
        data = [f"--data-path={self.folder}/data_text_document", "--data-impl=mmap", "--split=800,150,50"]
        return [*words, *data, *self.vocabulary, *ON_A_CPU]

    def run(self, name: str, command: list[str], ranks: int | None = None) -> str:
        """What a program says, by torchrun if it has ranks; into ``name.log`` as well."""
        with held_port() as port:
            if ranks:
                torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
                command = torchrun + command
            log = self.folder / f"{name}.log"
            with log.open("w") as out:
                started = subprocess.Popen(
                    [sys.executable, *command], cwd=self.tree, env=self.environment, stdout=out,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
                try:
                    ended = started.wait(LIMIT_S)
                except subprocess.TimeoutExpired:
                    os.killpg(started.pid, signal.SIGKILL)  # torchrun's ranks too
                    ended = f"nothing in {LIMIT_S} s"
        said = log.read_text()
        if ended != 0:
            raise SystemExit(f"{shlex.join(command)} ended with {ended}:\n{said[-3000:]}")
        return said

    def train(self, name: str, stages: int, load: Path | None = None, **block: object) -> Trained:
        """Runs ``pretrain_gpt.py``, which saves into the folder of that name."""
        config: dict[str, object] = {
            "train_batch_size": 16,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 1.0,
            "steps_per_print": 1000,
            "zero_optimization": {"stage": 1 if self.fp16 else 0},
            "optimizer": {"type": "DelayAwareNAdamW", "params": {"betas": [0.99, 0.999]}},
            "async_pipeline": block,
        }
        if self.fp16:
            config |= {"fp16": {"enabled": True, "initial_scale_power": 12}, "zero_allow_untested_optimizer": True}
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(config))
        command = [
            "-m",
            "noflush.run",
            "pretrain_gpt.py",
            *self.arguments(self.fp16),
            f"--pipeline-model-parallel-size={stages}",
        ]
        command += ["--deepspeed", f"--deepspeed_config={file}", f"--save={self.folder}/{name}"]
        said = self.run(name, [*command, *([f"--load={load}"] if load else [])], stages)
        losses = {int(iteration): loss for iteration, loss in _LOSS.findall(said)}
        return Trained(losses, float(_VALIDATION.findall(said)[0]), self.folder / name)  # after it the test set's

    def exported_loss(self, saved: Path) -> float:
        """Validation loss of what the tree's converter makes of a save, by its model without DeepSpeed, in float32."""
        out, script = self.folder / "exported", self.folder / "exported_loss.py"
        tag = (saved / "latest").read_text().strip()
        tool = str(self.tree / "tools/convert_checkpoint/deepspeed_to_megatron.py")
        self.run("export", [tool, f"--input_folder={saved / tag}", f"--output_folder={out}"])
        (file,) = out.glob("iter_*/mp_rank_00/model_optim_rng.pt")
        script.write_text(EXPORTED)
        said = self.run("exported_loss", [str(script), str(file), *self.arguments(fp16=False)], ranks=1)
        (loss,) = re.findall(r"^LOSS (\S+)", said, flags=re.MULTILINE)
        return float(loss)


@dataclass(frozen=True)
class Trained:
    """What a run printed.

    Attributes:
        losses: of the training batch, by iteration, as printed.
        validation: loss in nats at the end.
        saved: its folder of checkpoints.
    """

    losses: dict[int, str]
    validation: float
    saved: Path


EXPORTED = """
import sys, torch
from megatron.initialize import initialize_megatron
from megatron.arguments import core_transformer_config_from_args
from megatron.core.enums import ModelType
file = sys.argv.pop(1)
initialize_megatron(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
from megatron import get_args
from megatron.model import GPTModel
from megatron.utils import get_ltor_masks_and_position_ids
from pretrain_gpt import train_valid_test_datasets_provider
args = get_args()
args.model_type = ModelType.encoder_or_decoder
saved = torch.load(file, weights_only=False)["model"]
model = GPTModel(core_transformer_config_from_args(args), num_tokentypes=0, parallel_output=False)
head = saved.pop("word_embeddings_for_head")["weight"]
assert torch.equal(head, saved["language_model"]["embedding"]["word_embeddings"]["weight"]), "not tied"
model.load_state_dict(saved)
model.eval()
samples = args.eval_iters * args.global_batch_size
_, validation, _ = train_valid_test_datasets_provider([args.train_iters * args.global_batch_size, samples, samples])
losses = []
with torch.no_grad():
    for at in range(samples):
        text = torch.tensor(validation[at]["text"]).long()[None]
        tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        mask, _, positions = get_ltor_masks_and_position_ids(tokens, 0, False, False, False)
        out = model(tokens, positions, mask, labels=labels)
        losses.append((out[0] if isinstance(out, tuple) else out).float().mean())
print("LOSS", torch.stack(losses).mean().item())
"""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tree", type=Path, required=True, help="a checkout of Megatron-DeepSpeed")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--fp16", action="store_true", help="as the script has it (default: float32)")
    options = parser.parse_args()
    checkout = Checkout(options.tree, options.out, options.fp16)
    checkout.write_data()
    whole = checkout.train("whole", options.stages)
    twin = checkout.train("twin", options.stages, schedule="1f1b_flush")
    print("validation loss without the flush", whole.validation, "with it", twin.validation)
    first, last = (float(whole.losses[at]) for at in (FALLS_FROM, ITERATIONS))
    assert last < first - 0.5, f"loss {first} at iteration {FALLS_FROM}, {last} at {ITERATIONS}"

    middle = checkout.folder / "middle"
    shutil.copytree(whole.saved, middle)
    (middle / "latest").write_text(f"global_step{SAVED}")
    (middle / "latest_checkpointed_iteration.txt").write_text(str(SAVED))
    resumed = checkout.train("resumed", options.stages, load=middle)
    for at in range(SAVED + 1, ITERATIONS + 1):
        assert resumed.losses[at] == whole.losses[at], f"iteration {at}: {resumed.losses[at]}, not {whole.losses[at]}"
    print(f"resumed at {SAVED}: iterations {SAVED + 1} to {ITERATIONS} have the losses of the run that went on")

    exported = checkout.exported_loss(whole.saved)
    print("validation loss of the exported model", exported)
    tolerance = 2e-4 if options.fp16 else 2e-6  # of the loss: it is printed to six digits, and half precision rounds
    assert abs(exported - whole.validation) < tolerance * whole.validation, f"{exported}, not {whole.validation}"


if __name__ == "__main__":
    main()
