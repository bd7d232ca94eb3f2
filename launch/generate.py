"""Text from a trained model, by transformers: a run's newest checkpoint, or a Hugging Face folder.

python launch/generate.py --load runs/demo/no_flush --prompt "def main" --max-new-tokens 100
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from runpy import run_path
from typing import Any

if __name__ == "__main__" and not __package__:  # run by its path
    run_path(str(Path(__file__).with_name("own_code.py")))["or_exit"](__file__)

from noflush.launch.arguments.settings import Tokens
from noflush.launch.data.tokenizer import TRUST, TYPES, Tokenizer, make_tokenizer, untrusted
from noflush.launch.training.beside_weights import checkpoint_in, read_model, read_tokens

_ATTENTION = "eager"  # that every one of transformers' models has


def make_parser() -> argparse.ArgumentParser:
    """The options; those of the tokenizer are pretrain_gpt.py's."""
    parser = argparse.ArgumentParser(prog="generate.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--load", required=True, help="a run's --save folder, one checkpoint, or a Hugging Face folder")
    parser.add_argument("--prompt", required=True, help="what the text begins with")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token (default: 1)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest (default: all)")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--tokenizer-type", choices=TYPES, help="default: the one that the run was trained with")
    parser.add_argument("--tokenizer-model")
    parser.add_argument("--vocab-file")
    parser.add_argument("--merge-file")
    parser.add_argument("--vocab-size", type=int, help="of the NullTokenizer")
    parser.add_argument("--trust-remote-code", action="store_true", help=TRUST)
    return parser


def load_model(folder: str, trust_remote_code: bool = False) -> Any:
    """The transformers model in ``folder``, on the GPU if there is one. Raises ValueError if there is no model.

    A Hugging Face folder's own code runs if ``trust_remote_code``; its weights are read from safetensors alone.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from noflush.launch.convert.folder import is_hugging_face
    from noflush.launch.convert.hugging_face import to_hugging_face
    from noflush.launch.convert.state_dict import read_weights

    logging.disable_progress_bar()
    if is_hugging_face(folder):
        try:
            # Said for each: None would ask on the terminal whether to run the folder's code, a pytorch_model.bin is a
            # pickle, and a config.json may name an attention kernel to be fetched from a hub and run.
            network = AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                attn_implementation=_ATTENTION,
            )
        except Exception as error:  # whatever the library raises
            reason = untrusted(error) or _first_line(error)
            raise ValueError(f"--load {folder} cannot be loaded by transformers: {reason}") from None
    else:
        checkpoint = checkpoint_in(folder)
        model = read_model(checkpoint)
        config, weights = to_hugging_face(read_weights(checkpoint, model), model)
        dtype = getattr(torch, config.pop("torch_dtype"))
        network = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), dtype=dtype, attn_implementation=_ATTENTION
        )
        if model.tied:
            weights["lm_head.weight"] = network.get_input_embeddings().weight
        network.load_state_dict(weights)
        network.tie_weights()
    return network.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def tokenizer_of(args: argparse.Namespace) -> Tokenizer:
    """The tokenizer that the options name; without any the run's, or the Hugging Face folder's. Raises ValueError."""
    from noflush.launch.convert.folder import has_tokenizer, is_hugging_face

    kind, trust = args.tokenizer_type, args.trust_remote_code
    if kind is None and args.vocab_file and args.merge_file:
        kind = "GPT2BPETokenizer"
    if kind is None:
        if has_tokenizer(args.load):
            return make_tokenizer(Tokens("HuggingFaceTokenizer", args.load, None, None, None, 0, trust), download=False)
        if not is_hugging_face(args.load) and (found := read_tokens(checkpoint_in(args.load))):
            return make_tokenizer(dataclasses.replace(found, trust_remote_code=trust), download=False)
    return make_tokenizer(
        Tokens(kind, args.tokenizer_model, args.vocab_file, args.merge_file, args.vocab_size, 0, trust)
    )


def generate(
    network: Any, tokenizer: Tokenizer, prompt: str, new_tokens: int, temperature: float, top_k: int, seed: int
) -> str:
    """``prompt`` and what ``network`` makes of it: up to ``new_tokens`` tokens, ending where it ends the text.

    Raises ValueError if prompt and tokens do not go into the model.
    """
    import torch

    ids = tokenizer.tokenize(prompt)
    config = network.config
    if not ids:
        raise ValueError("--prompt is empty: give a word to begin with")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}: it was trained with "
            "another one"
        )
    if max(ids) >= config.vocab_size or min(ids) < 0:
        raise ValueError(f"--prompt holds the token {max(ids)}, and the model has {config.vocab_size}")
    if config.model_type == "gpt2" and len(ids) + new_tokens > config.n_positions:
        raise ValueError(
            f"a prompt of {len(ids)} tokens and --max-new-tokens {new_tokens}: together they must not be more than the "
            f"model's {config.n_positions} positions"
        )
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    # A Hugging Face folder's vocabulary may be padded: its last rows are no tokens.
    padding = list(range(tokenizer.vocab_size, config.vocab_size))
    found = network.generate(
        torch.tensor([ids], device=network.device),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=network.device),
        max_new_tokens=new_tokens,
        eos_token_id=tokenizer.eod,
        pad_token_id=tokenizer.eod,
        suppress_tokens=padding or None,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    return prompt + _behind(tokenizer, ids, found[0].tolist())


def _behind(tokenizer: Tokenizer, ids: Sequence[int], whole: list[int]) -> str:
    """Text of ``whole`` behind its first tokens ``ids``, without the token that ends it."""
    if whole[-1] == tokenizer.eod:
        whole = whole[:-1]
    # Decoded together: a character's bytes may lie in several tokens, and some tokenizers strip a leading space.
    start, text = tokenizer.detokenize(ids), tokenizer.detokenize(whole)
    return text[len(start) :] if text.startswith(start) else tokenizer.detokenize(whole[len(ids) :])


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def main(argv: list[str] | None = None) -> int:
    """Runs; the exit status."""
    args = make_parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if args.max_new_tokens < 1 or args.temperature < 0 or args.top_k < 0:
            raise ValueError("--max-new-tokens must be 1 or more, --temperature and --top-k not below 0")
        tokenizer = tokenizer_of(args)
        network = load_model(args.load, args.trust_remote_code)
        text = generate(network, tokenizer, args.prompt, args.max_new_tokens, args.temperature, args.top_k, args.seed)
    except (ValueError, OSError) as error:
        print(f"generate: {_first_line(error)}", file=sys.stderr)  # noqa: T201
        return 2
    print(text)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
