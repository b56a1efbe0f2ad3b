"""The weights of a checkpoint: finds their files, compares them with config.json, and loads them."""

from __future__ import annotations

import contextlib
import json
import math
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdar_lm_eval.errors import EngineError, UserError, listed
from sdar_lm_eval.families.base import Config, Family, Shapes, transformers_version
from sdar_lm_eval.files import one_line, read_json, require_regular, shown

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LESS_MEMORY = "Choose a smaller dtype, another device or a smaller checkpoint, or end what else runs there."
# Weights of older files that are ignored: they are computed from the config.
IGNORED_WEIGHTS = ("rotary_emb.inv_freq",)
MOST_HEADER_BYTES = 100_000_000  # as in safetensors/src/tensor.rs
FLOATS = ("F64", "F32", "F16", "BF16")
# A comparison by name takes long for many weights: a config.json that asks for more than this, and for more than twice
# as many as the files hold, is refused before the comparison.
COMPARED = 100_000


def weight_files(name: str, folder: Path) -> list[Path]:
    """The safetensors files that hold the weights: model.safetensors, else those of its index.

    Raises:
        UserError: there are none, one that the index names is missing, or one is no regular file.
    """
    files = _named_files(name, folder)
    if missing := [path.name for path in files if not path.exists()]:
        raise UserError(
            f"checkpoint {name!r} lacks weights: its index names {_listed(missing)}, which {folder} does not hold. "
            "Download it again."
        )
    for path in files:
        require_regular(path)
    return files


def _named_files(name: str, folder: Path) -> list[Path]:
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.exists():
        raise UserError(
            f"checkpoint {name!r} has no weights: {folder} holds neither {SINGLE} nor {INDEX}. Only these are read; "
            "convert others with transformers' save_pretrained."
        )
    weight_map = read_json(index).get("weight_map")
    files: list[Any] = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    if not all(isinstance(file, str) and "\0" not in file and Path(file).name == file for file in files):
        raise UserError(f"{index} has no weight_map from weights to files beside it. Download it again.")
    if others := sorted({file for file in files if not file.endswith(".safetensors")}):
        raise UserError(
            f"{index} names {_listed(others)}: only safetensors are read, since other files can hold code. Convert "
            "them with transformers' save_pretrained."
        )
    return [folder / file for file in sorted(set(files))]


def check_headers(name: str, folder: Path, config: Config, family: Family) -> None:
    """Check that existing weight files are whole, and that config.json does not ask for far more weights.

    Reads only the files' headers, and builds nothing. A folder without weight files passes.

    Raises:
        UserError: a file is missing, no safetensors file, or cut short, or config.json asks for far more weights.
    """
    if not ((folder / SINGLE).exists() or (folder / INDEX).exists()):
        return
    if not any(path.exists() for path in _named_files(name, folder)):  # the folder is used for its tokenizer only
        return
    found, asked = sum(len(read_shapes(path)) for path in weight_files(name, folder)), family.count(config)
    if asked > max(COMPARED, 2 * found):
        layers, experts = config.get("num_hidden_layers") or 0, config.get("num_experts") or 0
        counts = f"num_hidden_layers={layers:,}" + (f" and num_experts={experts:,}" if experts else "")
        raise UserError(
            f"config.json of checkpoint {name!r} asks for about {asked:,} weights ({counts}), but its files hold "
            f"{found:,}. Correct the file, or download the checkpoint again."
        )


def read_shapes(path: Path) -> Shapes:
    """Read the names and shapes in a safetensors file. A file shorter than its header promises is refused.

    Layout: 8 bytes little-endian header length, the header as JSON with `dtype`, `shape` and `data_offsets`, the data.

    Raises:
        UserError: the file is no safetensors file, is cut short, or holds other types than floating-point numbers.
    """
    size = require_regular(path).st_size
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8 or (length := struct.unpack("<Q", start)[0]) > size - 8:
                raise ValueError("its header is cut short")
            if length > MOST_HEADER_BYTES:
                raise ValueError(f"its header has {length:,} bytes, at most {MOST_HEADER_BYTES:,} are allowed")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size != end:
            raise ValueError(f"it has {size:,} bytes where its header promises {shown(end)}")
        if others := {entry["dtype"] for entry in header.values()} - set(FLOATS):
            raise ValueError(f"it holds weights of type {_listed(sorted(map(shown, others)))}, not {', '.join(FLOATS)}")
        return {name: tuple(entry["shape"]) for name, entry in header.items()}
    except RecursionError:
        raise UserError(
            f"{path} is not a whole safetensors file: its header is nested too deep. Download it again."
        ) from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {one_line(error)}. Download it again.") from error


def check_layout(name: str, config: PretrainedConfig, family: Family, files: Sequence[Path]) -> None:
    """Compare names and shapes of the weights with those that the config asks for.

    Raises:
        UserError: weights are missing, unexpected, of another shape, or cut short; the message names them.
    """
    found: Shapes = {}
    for path in files:
        found |= read_shapes(path)
    wanted = _layout_of(name, config, family)
    ignored = (*IGNORED_WEIGHTS, *(["lm_head.weight"] if config.tie_word_embeddings else []))
    wrong = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(weight for weight in found.keys() - wanted.keys() if not weight.endswith(ignored)),
        "of another shape": [
            f"{weight} {shown(found[weight])} in place of {shown(shape)}"
            for weight, shape in sorted(wanted.items())
            if found.get(weight, shape) != shape
        ],
    }
    if any(wrong.values()):
        told = "; ".join(f"{what}: {_listed(names)}" for what, names in wrong.items() if names)
        raise UserError(f"the weights of checkpoint {name!r} do not fit its config.json; {told}.")


def _layout_of(name: str, config: PretrainedConfig, family: Family) -> Shapes:
    try:
        return family.weights(config)
    except Exception as error:  # transformers' default of a key may have a type that `weights` does not expect
        raise UserError(f"config.json of checkpoint {name!r} cannot be used: {one_line(error)}") from error


def link_weights(files: Sequence[Path], index: Path, target: Path) -> None:
    """Link the weight files and their index, if there is one, into another folder."""
    for path in [*files, index]:
        if path.exists():
            (target / path.name).symlink_to(path.resolve())


def load(
    name: str,
    files: Sequence[Path],
    index: Path,
    family: Family,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> PreTrainedModel:
    """Load checked weights into transformers' model class; see `Checkpoint.load_model`."""
    import torch
    import transformers

    _check_memory(name, config, family, dtype, torch.device(device))
    with tempfile.TemporaryDirectory(prefix="sdar-weights-") as clean, _no_progress_bars():
        link_weights(files, index, Path(clean))
        (Path(clean) / "generation_config.json").write_text("{}")  # transformers 5 requires one
        try:
            model, report = getattr(transformers, family.model_class).from_pretrained(
                clean,
                config=config,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                device_map=torch.device(device),
                **{"dtype" if transformers_version() >= (4, 56) else "torch_dtype": dtype},
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the weights of checkpoint {name!r} do not fit on {device}: {error} {LESS_MEMORY}"
            ) from error
        except Exception as error:
            raise UserError(
                f"the weights of checkpoint {name!r} cannot be loaded: {type(error).__name__}: {one_line(error)}"
            ) from error
    not_taken = {
        str(weight) for what in ("missing_keys", "unexpected_keys", "mismatched_keys") for weight in report[what]
    }
    if config.tie_word_embeddings:
        not_taken.discard("lm_head.weight")
    if not_taken:
        raise EngineError(
            f"checkpoint {name!r} is whole, but transformers {transformers.__version__} did not load its "
            f"{_listed(sorted(not_taken))}. Install another version of transformers."
        )
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # even if the files hold a different head
    family.prepare(model)
    return model.requires_grad_(False).eval()


def _check_memory(
    name: str, config: PretrainedConfig, family: Family, dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse weights that do not fit into a GPU's memory, before they are read."""
    size = sum(map(math.prod, family.weights(config).values())) * dtype.itemsize
    free = free_memory(device)
    if free is not None and size > free:
        raise UserError(
            f"the weights of checkpoint {name!r} take {size / 2**30:.1f} GiB as {str(dtype).removeprefix('torch.')}, "
            f"but {device} has {free / 2**30:.1f} GiB free. {LESS_MEMORY}"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that new tensors can use on a GPU: free memory, and torch's unused memory. None for other devices."""
    import torch

    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging as bars

    enabled = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            bars.enable_progress_bar()


def _listed(names: Sequence[str]) -> str:
    short = [name if len(name) <= 100 and name.isprintable() else shown(name) for name in names[:5]]
    return listed([*short, *names[5:]], 5)
