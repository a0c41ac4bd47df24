"""The weights from which a new run starts, of another run or an imported checkpoint."""

from torch import Tensor, nn

from vqf.errors import UserError
from vqf.networks.weights import dtype_problem, nonfinite_names
from vqf.runs.checkpoint import Checkpoint
from vqf.terminal import log


def tokenizer_weights(checkpoint: Checkpoint) -> str:
    """The name of a checkpoint's weights of a tokenizer: the averaged ones, if there are any."""
    if checkpoint.kind == "stage2":
        return "tokenizer"
    return averaged_weights(checkpoint)


def averaged_weights(checkpoint: Checkpoint) -> str:
    """The name of a checkpoint's weights of the trained model: the averaged ones, if there are any."""
    return "ema" if checkpoint.has_weights("ema") else "model"


def load_matching(module: nn.Module, checkpoint: Checkpoint, name: str) -> None:
    """Load the tensors of equal name, shape and kind of number, and log the others one by one.

    Raises:
        UserError: If none fits, or one is not finite.
    """
    own, weights = module.state_dict(), checkpoint.load_weights(name)
    source = f"{checkpoint.path}/{name}.safetensors"
    if nonfinite := nonfinite_names(weights):
        raise UserError(f"{source}: not all values of '{nonfinite[0]}' are finite; start from an earlier checkpoint")
    differences = {key: _difference(own.get(key), weights.get(key)) for key in [*own, *(weights.keys() - own.keys())]}
    fitting = {key: weights[key] for key, difference in differences.items() if difference is None}
    if not fitting:
        raise UserError(f"{source}: none of its {len(weights)} tensors fits this model; is it of the same kind?")
    module.load_state_dict({**own, **fitting})
    log.info("%s: %d of the model's %d tensors loaded", source, len(fitting), len(own))
    for key, difference in differences.items():
        if difference is not None:
            log.info("  %s: %s", key, difference)


def _difference(own: Tensor | None, stored: Tensor | None) -> str | None:
    """Why a tensor of a file cannot be that of the model; None if it can."""
    if own is None:
        return "not in this model, so it is left out"
    if stored is None:
        return "not in the file, so it starts anew"
    if own.shape != stored.shape:
        shapes = [" x ".join(map(str, each.shape)) or "one number" for each in (stored, own)]
        return f"{shapes[0]} in the file, {shapes[1]} here, so it starts anew"
    problem = dtype_problem(stored, own)
    return f"{problem}, so it starts anew" if problem else None
