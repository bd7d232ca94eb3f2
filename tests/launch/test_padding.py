"""A padded id has no probability: in the loss, in its gradient, in training, in what is exported and generated.

The oracle is transformers' own forward on the same tokens, without padding: equal loss and equal probabilities.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

from noflush.launch import convert_checkpoint
from noflush.launch import generate as generating
from noflush.launch.arguments.parser import ArgumentsError
from noflush.launch.arguments.settings import Tokens
from noflush.launch.convert.arguments import arguments_of
from noflush.launch.convert.folder import write_folder
from noflush.launch.convert.hugging_face import to_hugging_face
from noflush.launch.convert.state_dict import read_weights, write_checkpoint
from noflush.launch.pretrain_gpt import settings_of
from noflush.launch.start_lines import start_lines
from noflush.launch.training.beside_weights import MODEL, WEIGHTS_ALONE, checkpoint_in, read_model, write_tokens
from tests.launch.models import GPT2, LLAMA, MODELS, weights
from tests.multiproc.ranks import run_ranks

IDS = 91  # odd, so that no tensor parallelism divides it
TOKENS = torch.arange(2 * 17).reshape(2, 17) * 7 % IDS
INPUTS, LABELS = TOKENS[:, :-1].contiguous(), TOKENS[:, 1:].contiguous()
VOCABULARIES = "embedding.word_embeddings.weight", "output_layer.weight"
ODD = {name: dataclasses.replace(model, vocabulary=IDS) for name, model in MODELS.items()}


def test_without_padding_every_row_is_a_token_id():
    argv = "--num-layers 2 --hidden-size 16 --num-attention-heads 4 --seq-length 8 --max-position-embeddings 8 --lr 1"
    argv += " --micro-batch-size 1 --train-iters 4 --mock-data --tokenizer-type NullTokenizer --vocab-size 90"
    padded, _ = settings_of(argv.split(), 1)
    whole, _ = settings_of([*argv.split(), "--no-pad-vocab-size"], 1)
    assert (padded.model.vocabulary, padded.model.vocabulary_padding) == (128, 37)
    assert (whole.model.vocabulary, whole.model.vocabulary_padding) == (IDS, 0)


def exported(folder, model):
    """A Hugging Face folder of ``model``, random."""
    write_folder(folder, *to_hugging_face(weights(model), model))
    return str(folder)


def judged(folder):
    """(loss, logits' gradient [b, s, ids]) by transformers; the gradient is (probabilities - labels) / tokens."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval()
    logits = network(INPUTS).logits.detach().requires_grad_()
    loss = F.cross_entropy(logits.flatten(0, 1), LABELS.flatten())
    loss.backward()
    return loss.item(), logits.grad


def made_by_transformers(folder):
    """Names of models that transformers itself made, in ``folder``/hf NAME; large enough for every part to matter."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    small = {"vocab_size": IDS, "initializer_range": 0.2}
    width = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = {
        "their gpt2": GPT2LMHeadModel(GPT2Config(n_positions=20, n_embd=32, n_layer=2, n_head=4, **small)),
        "their llama": LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **width, **small)),
        "their tied llama": LlamaForCausalLM(
            LlamaConfig(tie_word_embeddings=True, attention_bias=True, **width, **small)
        ),
    }
    for name, network in made.items():
        network.save_pretrained(folder / f"hf {name}")
    return list(made)


# ---- conversions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize(("tensor", "multiple"), [(1, 1), (1, 128), (2, 1), (2, 48)])
def test_there_and_back_changes_no_probability(name, tensor, multiple, tmp_path):
    model = ODD[name]
    if model.query_groups % tensor:
        pytest.skip("one group")
    loss, gradient = judged(exported(tmp_path / "hf", model))
    imported = convert_checkpoint.from_hf(str(tmp_path / "hf"), str(tmp_path / "im"), None, tensor, multiple)
    rows = -(-IDS // (tensor * multiple)) * tensor * multiple
    assert (imported.vocabulary, imported.token_ids) == (rows, IDS)
    assert read_model(checkpoint_in(tmp_path / "im")) == imported
    convert_checkpoint.to_hf(str(tmp_path / "im"), str(tmp_path / "out"), None, None)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == IDS
    back, theirs = judged(tmp_path / "out")
    assert back == loss
    assert torch.equal(theirs, gradient)


def test_a_head_that_favours_its_padding_is_cut(tmp_path):
    """Rows of padding that are anything but zeros, as a run leaves them."""
    padded = dataclasses.replace(GPT2, vocabulary_padding=5)
    state = weights(padded)
    state["output_layer.weight"][IDS:] *= 50
    write_checkpoint(tmp_path / "run", state, padded)
    convert_checkpoint.to_hf(str(tmp_path / "run"), str(tmp_path / "out"), None, None)
    cut = {name: w[:IDS] if name in VOCABULARIES else w for name, w in state.items()}
    model = dataclasses.replace(GPT2, vocabulary=IDS)
    write_folder(tmp_path / "hf", *to_hugging_face(cut, model))
    (loss, gradient), (back, theirs) = judged(tmp_path / "hf"), judged(tmp_path / "out")
    assert back == loss
    assert torch.equal(theirs, gradient)


# ---- the loss --------------------------------------------------------------------------------------------


def _loss_and_gradient(model, logits, labels):
    """Of this slice's ``logits``, which are left as they are."""
    from noflush.launch.gpt.pipeline import next_token_loss

    leaf = logits.detach().clone().requires_grad_()
    loss = next_token_loss(model)(leaf * 1, labels)
    loss.backward()
    return loss.item(), leaf.grad


def _join(tensor):
    from noflush.launch.arguments.settings import Ranks
    from noflush.launch.training.random_state import seed_everything
    from noflush.launch.training.start import join

    join(Ranks(tensor, tensor, 1, "gloo", 10))
    seed_everything(1, 0)


def _losses(rank, tensor, folder, names):
    """By model's name, loss and gradient [s, b, v / tensor] of the pipeline's layers with an import's weights."""
    from deepspeed.pipe import TiedLayerSpec

    from noflush.launch.gpt.pipeline import layer_specs

    _join(tensor)
    found = {}
    for name in names:
        checkpoint = checkpoint_in(f"{folder}/{name}")
        model = read_model(checkpoint)
        hidden, embedding = (INPUTS, torch.arange(16).expand(2, -1)), None
        with torch.no_grad():
            for number, spec in enumerate(layer_specs(model, 1, tensor)):
                if isinstance(spec, TiedLayerSpec) and embedding is not None:
                    hidden = spec.forward_fn(embedding, hidden)
                    continue
                layer = spec.build().eval()
                layer.load_state_dict(torch.load(checkpoint / f"layer_{number:02d}-model_{rank:02d}-model_states.pt"))
                embedding = embedding or layer
                hidden = layer(hidden)
        found[name] = _loss_and_gradient(model, hidden, (LABELS, torch.ones(2, 16)))
    return found


@pytest.mark.multiproc
@pytest.mark.parametrize(("tensor", "multiple"), [(1, 128), (2, 1), (2, 100)], ids=["TP1", "TP2", "a slice of padding"])
def test_an_imports_loss_and_probabilities_are_transformers(tensor, multiple, tmp_path):
    """Of every layout, and of transformers' own making; TP 2 with one padded row, and with a slice of nothing else."""
    models = {name: dataclasses.replace(model, query_groups=max(2, model.query_groups)) for name, model in ODD.items()}
    for name, model in models.items():
        exported(tmp_path / f"hf {name}", model)
    names = [*models, *made_by_transformers(tmp_path)]
    for name in names:
        convert_checkpoint.from_hf(str(tmp_path / f"hf {name}"), str(tmp_path / name), None, tensor, multiple)
    found = run_ranks(_losses, tensor, tensor=tensor, folder=str(tmp_path), names=names)
    for name in names:
        loss, gradient = judged(tmp_path / f"hf {name}")
        assert loss > 4, name
        slices = [result[name] for result in found]
        assert [mine for mine, _ in slices] == [pytest.approx(loss, abs=1e-5)] * tensor, name
        whole = torch.cat([part for _, part in slices], -1).transpose(0, 1)
        assert whole.shape[-1] == -(-IDS // (tensor * multiple)) * tensor * multiple
        torch.testing.assert_close(whole[..., :IDS], gradient, rtol=1e-4, atol=1e-6, msg=name)
        assert not whole[..., IDS:].any(), name


CASES = [(dtype, low, ids) for dtype in ("float32", "bfloat16") for low in (False, True) for ids in (30, 50, 64)]


def _random_losses(rank):
    _join(2)
    draw = torch.Generator().manual_seed(0)
    found = []
    for dtype, low, ids in CASES:
        model = dataclasses.replace(GPT2, vocabulary=64, vocabulary_padding=64 - ids, loss_in_low_precision=low)
        logits = torch.randn(8, 2, 64, generator=draw).to(getattr(torch, dtype))
        logits[..., ids:] += 1e4  # were it counted, nothing else would be
        labels = torch.randint(0, ids, (2, 8), generator=draw)
        labels[0, 0] = 63  # where the loss mask is 0, anything may stand
        mask = torch.ones(2, 8)
        mask[0, 0] = 0
        mine = _loss_and_gradient(model, logits[..., rank * 32 : rank * 32 + 32], (labels, mask))
        found.append((*mine, logits, labels, mask))
    return found


@pytest.mark.multiproc
def test_the_loss_of_two_slices_is_that_of_the_token_ids_alone():
    first, second = run_ranks(_random_losses, 2)
    for (dtype, _, ids), one, two in zip(CASES, first, second, strict=True):
        (loss, left, logits, labels, mask), (again, right, *_) = one, two
        leaf = logits[..., :ids].float().requires_grad_()
        kept = mask.bool()
        expected = F.cross_entropy(leaf.transpose(0, 1)[kept], labels[kept])
        expected.backward()
        assert loss == again == pytest.approx(expected.item(), rel=1e-6)
        gradient = torch.cat([left, right], -1).float()
        error = 1e-7 if dtype == "float32" else 1e-3
        torch.testing.assert_close(
            gradient[..., :ids], leaf.grad, rtol=1e-5 if dtype == "float32" else 1e-2, atol=error
        )
        assert not gradient[..., ids:].any()


# ---- training --------------------------------------------------------------------------------------------

TRAINING = f"""--micro-batch-size 2 --global-batch-size 4 --train-iters 6 --lr 3e-3 --vocab-size {IDS - 1} --mock-data
    --seq-length 16 --pipeline-model-parallel-size 2 --weight-decay 0.1 --clip-grad 0.5 --attention-dropout 0
    --hidden-dropout 0"""


def _batches(seed):
    draw = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(0, IDS, (2, 17), generator=draw) ** 2 // IDS  # some far more often: there is to learn
        positions, mask = torch.arange(16).expand(2, -1).contiguous(), torch.ones(2, 16)
        yield (tokens[:, :-1].contiguous(), positions), (tokens[:, 1:].contiguous(), mask)


def _train(rank, argv, ranks):
    """Losses of six iterations, then of two held-out micro-batches; a checkpoint."""
    from noflush.launch.arguments.progress import Position
    from noflush.launch.training import checkpoint
    from noflush.launch.training.start import build_engine, join
    from noflush.stage.checkpoint import newest_complete

    settings, _ = settings_of(argv, ranks)
    join(settings.ranks)
    engine = build_engine(settings)
    assert checkpoint.load(engine, settings.checkpoints, newest_complete(settings.checkpoints.load)) is not None
    data = _batches(1)
    losses = [float(engine.train_batch(data_iter=data)) for _ in range(6)]
    checkpoint.save(engine, settings.checkpoints, settings.model, settings.tokens, Position(iteration=6))
    return losses, float(engine.eval_batch(_batches(9), num_micro_batches=2))


@pytest.mark.multiproc
def test_a_padded_run_is_the_run_without_padding_and_so_is_its_export(tmp_path):
    """PP 2 of 91 rows, and TP 2 x PP 2 of 200, whose second slice is all padding; then what transformers computes."""
    from transformers import AutoModelForCausalLM

    # Weights as small as a new model's, so that six steps are enough to learn something.
    model = dataclasses.replace(LLAMA, vocabulary=IDS)
    state = {name: w if "norm" in name else w / 4 for name, w in weights(model).items()}
    write_folder(tmp_path / "hf", *to_hugging_face(state, model))
    found = {}
    for name, tensor, multiple in (("plain", 1, 1), ("padded", 2, 100)):
        imported, run = str(tmp_path / f"{name} im"), str(tmp_path / name)
        convert_checkpoint.from_hf(str(tmp_path / "hf"), imported, None, tensor, multiple)
        argv = [f"@{imported}/model.args", *TRAINING.split(), "--load", imported, "--finetune", "--save", run]
        found[name] = run_ranks(_train, 2 * tensor, argv=argv, ranks=2 * tensor)[-1]
    losses, held_out = found["plain"]
    assert len(set(losses)) == 6
    assert losses[0] == pytest.approx(math.log(IDS), rel=0.1)
    assert abs(held_out - losses[0]) > 0.1
    assert found["padded"][0] == pytest.approx(losses, abs=2e-5)
    assert found["padded"][1] == pytest.approx(held_out, abs=2e-5)

    checkpoint = checkpoint_in(tmp_path / "padded")
    trained = read_model(checkpoint)
    assert (trained.vocabulary, trained.token_ids) == (200, IDS)
    trained_weights = read_weights(checkpoint, trained)
    for name in VOCABULARIES:
        assert len(trained_weights[name]) == 200
        assert not trained_weights[name][IDS:].any(), name  # no gradient has reached them
    convert_checkpoint.to_hf(str(tmp_path / "padded"), str(tmp_path / "out"), None, None)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    theirs = []
    for (tokens, _), (labels, _) in itertools.islice(_batches(9), 2):
        with torch.no_grad():
            theirs.append(F.cross_entropy(network(tokens).logits.flatten(0, 1), labels.flatten()).item())
    assert sum(theirs) / 2 == pytest.approx(found["padded"][1], abs=1e-5)


# ---- which ids there are ---------------------------------------------------------------------------------

NEW = "--micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 1e-3 --mock-data --num-layers 1 --hidden-size 8 "
NEW += "--num-attention-heads 1 --seq-length 4 --max-position-embeddings 4"


@pytest.mark.parametrize(
    ("arguments", "rows", "ids"),
    [
        ("--vocab-size 90", 128, 91),
        ("--vocab-size 90 --make-vocab-size-divisible-by 1", 91, 91),
        ("--vocab-size 90 --padded-vocab-size 100", 100, 91),
        ("--vocab-size 90 --padded-vocab-size 91", 91, 91),
        ("--vocab-size 90 --vocab-extra-ids 4", 128, 95),
    ],
)
def test_the_tokenizer_says_how_many_ids_there_are(arguments, rows, ids):
    settings, _ = settings_of(f"{NEW} {arguments}".split(), 1)
    assert (settings.model.vocabulary, settings.model.token_ids) == (rows, ids)
    said = f"vocabulary {ids}" + (f" (and {rows - ids} rows of padding, without probability);" if rows > ids else ";")
    assert said in start_lines(settings, 1, {})[0]


def test_ids_with_gaps_between_them_are_all_ids(tmp_path):
    """A tokenizer of three words, the last of which is number 9: ten ids, or its logit would be masked."""
    from tokenizers import Tokenizer, models

    from noflush.launch.data.tokenizer import make_tokenizer

    Tokenizer(models.WordLevel({"a": 0, "b": 4, "<end>": 9}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = make_tokenizer(Tokens("HuggingFaceTokenizer", str(tmp_path), None, None, None, 0, False))
    assert (found.vocab_size, found.eod) == (10, 9)


def resumable(folder, model, old=False):
    """A run's checkpoint of ``model``, of which only what is read before training is true; and its arguments."""
    checkpoint = write_checkpoint(folder, weights(model), model)
    (checkpoint / WEIGHTS_ALONE).unlink()
    if old:
        fields = json.loads((checkpoint / MODEL).read_text())
        del fields["vocabulary_padding"]
        (checkpoint / MODEL).write_text(json.dumps(fields))
    training = "--micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 1e-3 --mock-data"
    options = " ".join(arguments_of(model)).replace("--seq-length 24", "--seq-length 16")
    return f"{options} {training} --load {folder}".split()


def of_the_checkpoint(settings):
    """What a run says of the checkpoint that it loads."""
    return [note for note in settings.notes if note.startswith("--load")]


PADDED = dataclasses.replace(LLAMA, vocabulary_padding=LLAMA.vocabulary - IDS)


def test_a_run_goes_on_with_the_ids_it_began_with(tmp_path):
    argv = resumable(tmp_path / "run", PADDED)
    settings, _ = settings_of([*argv, "--vocab-size", str(IDS - 1)], 1)
    assert settings.model.token_ids == IDS
    assert of_the_checkpoint(settings) == []
    with pytest.raises(ArgumentsError, match=r"vocabulary_padding = 5, the arguments say 7"):
        settings_of([*argv, "--vocab-size", str(IDS - 3)], 1)


def test_a_checkpoint_from_before_padding_was_told_apart_goes_on_as_it_was_trained(tmp_path):
    argv = [*resumable(tmp_path / "run", LLAMA, old=True), "--vocab-size", str(IDS - 1)]
    assert read_model(checkpoint_in(tmp_path / "run")).token_ids == LLAMA.vocabulary
    settings, _ = settings_of(argv, 1)
    assert settings.model.token_ids == LLAMA.vocabulary
    (note,) = of_the_checkpoint(settings)
    assert "5 rows of padding were trained as token ids" in note
    settings, _ = settings_of([*argv, "--finetune"], 1)
    assert settings.model.token_ids == IDS


def test_weights_of_another_tokenizer_are_said(tmp_path):
    argv = [*resumable(tmp_path / "run", PADDED), "--finetune", "--vocab-size"]
    for ids, said in (
        (IDS, None),
        (IDS - 2, "last 2 of its ids have no prob"),
        (IDS + 2, "last 2 are rows of padding"),
    ):
        settings, _ = settings_of([*argv, str(ids - 1)], 1)
        assert settings.model.token_ids == ids
        notes = of_the_checkpoint(settings)
        assert len(notes) == (said is not None)
        assert all(said in note for note in notes)


# ---- text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["run", "folder"])
@pytest.mark.parametrize("how", [["--temperature", "0"], ["--seed", "3"], ["--top-k", "5"]], ids=" ".join)
def test_padding_is_never_generated(of, how, tmp_path, capsys):
    """Of a head that favours it: a run's, and a folder's whose tokenizer has fewer ids than it has rows."""
    model = dataclasses.replace(LLAMA, vocabulary_padding=16)
    state = weights(model)
    state["output_layer.weight"][80:] *= 50
    tokens = Tokens("NullTokenizer", None, None, None, 79, 0, False)
    write_tokens(write_checkpoint(tmp_path / "run", state, model), tokens)
    whole = dataclasses.replace(model, vocabulary_padding=0)
    write_folder(tmp_path / "folder", *to_hugging_face(state, whole))
    network = generating.load_model(str(tmp_path / "folder"))
    assert network(torch.tensor([[3, 1, 4]])).logits.argmax(-1).min() >= 80
    numbers = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "79"] if of == "folder" else []
    given = ["--load", str(tmp_path / of), "--prompt", "3 1 4", "--max-new-tokens", "20", *numbers, *how]
    assert generating.main(given) == 0
    ids = [int(word) for word in capsys.readouterr().out.split()]
    assert len(ids) > 3
    assert max(ids) < 80
