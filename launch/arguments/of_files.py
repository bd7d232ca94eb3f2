"""What the arguments say of data, tokenizer, checkpoints and logs. What the files hold is checked by `files`."""

from __future__ import annotations

from pathlib import Path

from noflush.launch.arguments.files import paths_from_files
from noflush.launch.arguments.progress import Position
from noflush.launch.arguments.settings import Checkpoints, Data, Logs, Tokens
from noflush.launch.arguments.values import Values
from noflush.launch.training.beside_weights import read_position
from noflush.stage.checkpoint import CheckpointError, newest_complete


def read_data(of: Values) -> Data:
    blend = of.data_path
    splits = of.train_data_path, of.valid_data_path, of.test_data_path
    blend, splits = paths_from_files(of.data_args_path, of.per_split_data_args_path, blend, splits, of.faults)
    by_split = any(splits)
    if sum((bool(blend), by_split, bool(of.mock_data))) > 1:
        of.faults.append("--data-path, --train-data-path ... and --mock-data: give one of the three")
    if not (blend or by_split or of.mock_data or of.data_args_path or of.per_split_data_args_path):
        of.faults.append(
            "no data: give --data-path PREFIX of a .bin/.idx pair (preprocess_data.py makes it), or --mock-data"
        )
    if by_split and not splits[0]:
        of.faults.append("--valid-data-path or --test-data-path without --train-data-path: add it")
    return Data(
        **of.taken("data"),
        blend=tuple(blend) if blend else None,
        splits=tuple(tuple(s) if s else None for s in splits) if by_split else None,
        split=None if by_split else of.split,
        mock=bool(of.mock_data),
        order=of.dataloader_type or "single",
    )


def read_tokens(of: Values) -> Tokens:
    kind = of.tokenizer_type
    if kind is None and of.vocab_file and of.merge_file:
        kind = "GPT2BPETokenizer"
    if kind == "HFTokenizer":  # Megatron-DeepSpeed's name
        kind = "HuggingFaceTokenizer"
    if kind is None and of.vocab_size:
        kind = "NullTokenizer"
    return Tokens(**of.taken("tokens"), type=kind)


def read_checkpoints(of: Values) -> Checkpoints:
    tag = of.load_tag or (f"global_step{of.ckpt_step}" if of.ckpt_step is not None else None)
    load, finetune = of.load, of.finetune
    # As Megatron: where to begin, until there is a checkpoint of the run's own to go on from.
    if of.pretrained_checkpoint and not (load and _has_checkpoint(load)):
        load, finetune, tag = of.pretrained_checkpoint, True, None
    of.note_without(bool(load), "--load", "load_tag", "ckpt_step")
    of.note_without(bool(of.save), "--save", "save_interval")
    return Checkpoints(
        **of.taken("checkpoints"),
        load=load,
        tag=tag,
        finetune=finetune,
        load_optimizer=not (finetune or of.no_load_optim),
        load_rng=not (finetune or of.no_load_rng),
        save_rng=not of.no_save_rng,
    )


def _has_checkpoint(folder: str) -> bool:
    try:
        return newest_complete(folder) is not None
    except (CheckpointError, OSError):  # said when the folder is looked at
        return True


def read_start(of: Values, checkpoints: Checkpoints) -> Position:
    """Where the checkpoint to load stands; the beginning, for one that is too old to say so without being loaded."""
    try:
        tag = checkpoints.load and (checkpoints.tag or newest_complete(checkpoints.load))
    except (CheckpointError, OSError):  # said when the folder is looked at
        return Position()
    if not tag or checkpoints.finetune:
        return Position()
    try:
        return read_position(Path(checkpoints.load or "") / tag) or Position()
    except ValueError as error:
        of.faults.append(f"--load {checkpoints.load}: {error}; name another checkpoint by --ckpt-step")
        return Position()


def read_logs(of: Values) -> Logs:
    project = of.wandb_project or None
    of.note_without(bool(project), "--wandb-project", "wandb_exp_name", "wandb_save_dir", "wandb_entity")
    if project and not of.wandb_exp_name:
        of.faults.append(f"--wandb-project {project} without --wandb-exp-name: name the experiment")
    return Logs(
        **of.taken("logs"),
        wandb_project=project,
        wandb_name=of.wandb_exp_name or None,
        wandb_dir=of.wandb_save_dir or None,
        wandb_entity=of.wandb_entity or None,
    )
