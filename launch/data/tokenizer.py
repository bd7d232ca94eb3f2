"""Tokenizers by Megatron's names, made by the libraries that own them.

megatron-core's own GPT2BPETokenizer asks the model hub for files that were given on the command line, and
transformers 5 reads ``vocab_file=`` as an empty vocabulary; so GPT-2's two files go to `tokenizers` directly.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from noflush.launch.arguments.settings import Tokens

TYPES = (
    "GPT2BPETokenizer",
    "HuggingFaceTokenizer",
    "NullTokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
)


TRUST = "run the code that a Hugging Face folder brings along; from the command line alone, never from a file"
"""What --trust-remote-code means."""


class Tokenizer:
    """What megatron-core's datasets and the launcher ask of a tokenizer.

    Attributes:
        vocab_size: token ids there are, the end-of-document token included.
        eod: id of the end-of-document token.
        pad: id to pad with.
        unique_identifiers: what megatron-core names its cached indices by.
    """

    def __init__(
        self,
        settings: Tokens,
        vocab_size: int,
        eod: int,
        encode: Callable[[str], Sequence[int]],
        decode: Callable[[list[int]], str],
    ) -> None:
        self.vocab_size = vocab_size + settings.extra_ids
        if not 0 <= eod < self.vocab_size:
            raise ValueError(
                f"the tokenizer's end-of-document token is {eod}, outside its vocabulary, 0 to {self.vocab_size - 1}: "
                "use one that has such a token"
            )
        self.eod = self.pad = eod
        self.unique_identifiers: OrderedDict[str, Any] = OrderedDict(
            type=settings.type, model=settings.model, vocab_file=settings.vocab_file, merge_file=settings.merge_file
        )
        self._encode = encode
        self._decode = decode

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``, nothing added."""
        return list(self._encode(text))

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ``ids``."""
        return self._decode(list(ids))


def make_tokenizer(settings: Tokens, download: bool = True) -> Tokenizer:
    """The tokenizer that ``settings`` name. Raises ValueError with the reason and the fix if it cannot be made.

    Without ``download`` a hub's name is looked for among what was downloaded before: for names that stand in a file.
    """
    if settings.type is None:
        raise ValueError(
            "no tokenizer: give --tokenizer-type GPT2BPETokenizer with --vocab-file and --merge-file, "
            "HuggingFaceTokenizer with --tokenizer-model, or NullTokenizer with --vocab-size"
        )
    makers = {
        "GPT2BPETokenizer": _gpt2,
        "HuggingFaceTokenizer": lambda settings: _hugging_face(settings, download),
        "NullTokenizer": _null,
        "SentencePieceTokenizer": _sentencepiece,
        "GPTSentencePieceTokenizer": _sentencepiece,
        "Llama2Tokenizer": _sentencepiece,
    }
    if settings.type not in makers:
        raise ValueError(f"--tokenizer-type {settings.type}: use one of {', '.join(TYPES)}")
    return makers[settings.type](settings)


def _gpt2(settings: Tokens) -> Tokenizer:
    from tokenizers.implementations import ByteLevelBPETokenizer

    for option, path in (("--vocab-file", settings.vocab_file), ("--merge-file", settings.merge_file)):
        if path is None:
            raise ValueError(f"--tokenizer-type GPT2BPETokenizer without {option}: add it")
    try:
        bpe = ByteLevelBPETokenizer(settings.vocab_file, settings.merge_file)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(
            f"--vocab-file {settings.vocab_file} and --merge-file {settings.merge_file} are no GPT-2 vocabulary: "
            f"{error}"
        ) from None
    eod = bpe.token_to_id("<|endoftext|>")
    if eod is None:
        raise ValueError(f"--vocab-file {settings.vocab_file} has no <|endoftext|>: GPT-2's end-of-document token")
    return Tokenizer(settings, _ids(bpe.get_vocab()), eod, lambda text: bpe.encode(text).ids, bpe.decode)


def _ids(vocabulary: Mapping[str, int]) -> int:
    """How many ids a vocabulary takes: some are not numbered without gaps."""
    return max(vocabulary.values(), default=-1) + 1


def _hugging_face(settings: Tokens, download: bool) -> Tokenizer:
    if settings.model is None:
        raise ValueError(
            "--tokenizer-type HuggingFaceTokenizer without --tokenizer-model: give a folder or a hub's name"
        )
    try:
        auto = auto_tokenizer(settings, download)
    except Exception as error:  # whatever the library or its plug-ins raise
        reason = untrusted(error) or (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"--tokenizer-model {settings.model} cannot be loaded by transformers: {reason}") from None
    if auto.eos_token_id is None:
        raise ValueError(f"the tokenizer in {settings.model} has no end-of-sequence token: set eos_token in its config")
    return Tokenizer(
        settings,
        _ids(auto.get_vocab()),
        auto.eos_token_id,
        lambda text: auto.encode(text, add_special_tokens=False),
        auto.decode,
    )


def auto_tokenizer(settings: Tokens, download: bool) -> Any:
    """transformers' own tokenizer of ``settings.model``. Raises whatever the library raises."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        settings.model, trust_remote_code=settings.trust_remote_code, local_files_only=not download
    )


def untrusted(error: Exception) -> str | None:
    """What to do where transformers raised ``error`` because a folder brings code of its own; else None."""
    if "trust_remote_code" not in str(error):
        return None
    return "it brings code of its own; read that, then add --trust-remote-code to the command line to run it"


def _null(settings: Tokens) -> Tokenizer:
    if settings.vocab_size is None:
        raise ValueError("--tokenizer-type NullTokenizer without --vocab-size: add it")
    if settings.vocab_size < 1:
        raise ValueError(f"--vocab-size {settings.vocab_size}: it must be 1 or more")
    # As Megatron's: numbers in, numbers out, and one id more for the end of a document.
    return Tokenizer(
        settings,
        settings.vocab_size + 1,
        settings.vocab_size,
        lambda text: [_number(word) for word in text.split()],
        lambda ids: " ".join(map(str, ids)),
    )


def _number(word: str) -> int:
    # int() takes more: 1_000, and the digits of other scripts. 19 digits are more than any vocabulary has.
    digits = word.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
        raise ValueError(f"{word[:20]!r} is no token id; the NullTokenizer takes whole numbers with spaces between")
    return int(word)


def _sentencepiece(settings: Tokens) -> Tokenizer:
    if settings.model is None:
        raise ValueError(f"--tokenizer-type {settings.type} without --tokenizer-model: give the .model file")
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ValueError(f"--tokenizer-type {settings.type} needs sentencepiece: pip install sentencepiece") from None
    try:
        pieces = SentencePieceProcessor(model_file=settings.model)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--tokenizer-model {settings.model} is no sentencepiece model: {error}") from None
    return Tokenizer(settings, pieces.vocab_size(), pieces.eos_id(), pieces.encode, pieces.decode)


def padded_vocabulary(size: int, multiple: int) -> int:
    """``size`` rounded up to a multiple of ``multiple`` (Megatron's --make-vocab-size-divisible-by x tensor ranks)."""
    return -(-size // multiple) * multiple
