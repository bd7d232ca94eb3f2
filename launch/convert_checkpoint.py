"""Weights out of a run and into one: pretrain_gpt.py's checkpoints to and from Hugging Face folders.

python launch/convert_checkpoint.py --to-hf runs/demo/no_flush exported
python launch/convert_checkpoint.py --from-hf exported imported
deepspeed ... launch/pretrain_gpt.py @imported/model.args --load imported --finetune ...
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from runpy import run_path
from typing import TYPE_CHECKING

if __name__ == "__main__" and not __package__:  # run by its path
    run_path(str(Path(__file__).with_name("own_code.py")))["or_exit"](__file__)

from noflush.launch.arguments.settings import Model, Tokens
from noflush.launch.data.tokenizer import TRUST, make_tokenizer
from noflush.launch.training.beside_weights import checkpoint_in, read_model, read_tokens

if TYPE_CHECKING:
    from torch import Tensor

ARGUMENTS = "model.args"
"""File of pretrain_gpt.py's options that an imported checkpoint's model goes by."""
_DTYPES = ("float32", "bfloat16", "float16")
_WRITABLE = ("GPT2BPETokenizer", "HuggingFaceTokenizer")


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog="convert_checkpoint.py", description=(__doc__ or "").split("\n")[0])
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--to-hf", nargs=2, metavar=("CHECKPOINTS", "OUT"), help="a run's --save folder, a new folder")
    way.add_argument("--from-hf", nargs=2, metavar=("FOLDER", "OUT"), help="a Hugging Face folder, a new folder")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights written (default: as they are read)")
    parser.add_argument("--vocab-file", help="--to-hf: GPT-2's vocab.json (default: the run's tokenizer)")
    parser.add_argument("--merge-file", help="--to-hf: GPT-2's merges.txt")
    parser.add_argument("--tokenizer-model", help="--to-hf: a Hugging Face tokenizer's folder")
    parser.add_argument("--trust-remote-code", action="store_true", help=f"--to-hf: {TRUST}")
    parser.add_argument(
        "--tensor-model-parallel-size", type=int, default=1, metavar="N", help="--from-hf: of the run to come"
    )
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=1,
        metavar="N",
        help="--from-hf: add rows that are no token's, without probability, until N x the tensor-parallel size divides "
        "the vocabulary (default: %(default)s)",
    )
    return parser


def _cast(state: dict[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    import torch

    return {name: weight.to(getattr(torch, dtype)) for name, weight in state.items()} if dtype else state


def _named_tokens(args: argparse.Namespace) -> Tokens | None:
    """The tokenizer that the options name."""
    if args.tokenizer_model:
        return Tokens("HuggingFaceTokenizer", args.tokenizer_model, None, None, None, 0, args.trust_remote_code)
    if args.vocab_file or args.merge_file:
        return Tokens("GPT2BPETokenizer", None, args.vocab_file, args.merge_file, None, 0, False)
    return None


def to_hf(
    checkpoints: str, out: str, dtype: str | None, tokens: Tokens | None, trust_remote_code: bool = False
) -> tuple[Model, str]:
    """Writes the newest checkpoint in ``checkpoints`` to the folder ``out``; its model, and words on the tokenizer.

    Without ``tokens`` the tokenizer is the run's, if its files are still there; ``trust_remote_code`` is for its code.
    Raises ValueError.
    """
    from noflush.launch.convert.folder import write_folder
    from noflush.launch.convert.hugging_face import layout_of, to_hugging_face
    from noflush.launch.convert.state_dict import read_weights

    checkpoint = checkpoint_in(checkpoints)
    model = read_model(checkpoint)
    layout_of(model)  # before anything large is read
    eod, note = None, "no tokenizer"
    wanted, download = tokens, tokens is not None
    if wanted is None and (found := read_tokens(checkpoint)):
        wanted = dataclasses.replace(found, trust_remote_code=trust_remote_code)
    if wanted is not None and wanted.type in _WRITABLE:
        try:
            eod = make_tokenizer(wanted, download).eod
            note = f"tokenizer {wanted.type} of {wanted.model or wanted.vocab_file}"
        except ValueError as error:
            if tokens is not None:
                raise
            wanted, note = None, f"no tokenizer: {error}"
    else:
        wanted = None
    config, weights = to_hugging_face(_cast(read_weights(checkpoint, model), dtype), model, eod)
    write_folder(out, config, weights, wanted, download)
    return model, note


def from_hf(folder: str, out: str, dtype: str | None, tensor_parallel: int = 1, vocabulary_multiple: int = 1) -> Model:
    """Writes the Hugging Face folder ``folder`` as checkpoint ``out``, `ARGUMENTS` beside it. Raises ValueError."""
    from noflush.launch.convert.arguments import arguments_of
    from noflush.launch.convert.folder import read_folder
    from noflush.launch.convert.hugging_face import from_hugging_face
    from noflush.launch.convert.state_dict import pad_vocabulary, write_checkpoint

    state, model = from_hugging_face(*read_folder(folder))
    state, model = pad_vocabulary(state, model, vocabulary_multiple * tensor_parallel)
    write_checkpoint(out, _cast(state, dtype), model, tensor_parallel)
    lines = [*arguments_of(model), f"--tensor-model-parallel-size {tensor_parallel}"]
    (Path(out) / ARGUMENTS).write_text("\n".join(lines) + "\n")
    return model


def main(argv: list[str] | None = None) -> int:
    """Runs; the exit status."""
    args = make_parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if args.to_hf:
            source, out = args.to_hf
            model, note = to_hf(source, out, args.dtype, _named_tokens(args), args.trust_remote_code)
            print(f"{out}: {model.layers} layers, width {model.hidden}, {model.token_ids:,} tokens; {note}")  # noqa: T201
        else:
            source, out = args.from_hf
            sizes = args.tensor_model_parallel_size, args.make_vocab_size_divisible_by
            from_hf(source, out, args.dtype, *(max(1, size) for size in sizes))
            print(f"{out}: train with @{out}/{ARGUMENTS} --load {out} --finetune")  # noqa: T201
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
