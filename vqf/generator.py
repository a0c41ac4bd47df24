"""The generator: a tokenizer, a prior over its codes, and a sampler. What a user of a stage-2 run holds."""

import inspect
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from vqf.errors import UserError, unknown
from vqf.protocols import Batch, Conditioner, Prior, Sampler, Size, pair
from vqf.tokenizer import Tokenizer


class Generator(nn.Module):
    """Draws new images.

    Args:
        classes: Names of the labels that the conditioner knows; empty where there are none.
    """

    def __init__(
        self, tokenizer: Tokenizer, conditioner: Conditioner, prior: Prior, sampler: Sampler, classes: Sequence[str]
    ) -> None:
        super().__init__()
        self.tokenizer, self.conditioner, self.prior = tokenizer, conditioner, prior
        self.sampler = sampler
        self.classes = list(classes)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.tokenizer.parameters()).device

    @torch.no_grad()
    def sample(
        self,
        count: int,
        *,
        label: int | str | None = None,
        labels: Sequence[int] | Tensor | None = None,
        seed: int = 0,
        first: int = 0,
        batch_size: int = 64,
        size: int | Sequence[int] | None = None,
    ) -> Tensor:
        """Draw `count` images (count, 3, H, W) in [-1, 1].

        Picture i depends on `seed`, `first + i` and its label alone, not on the batch size.

        Args:
            count: How many.
            label: One class for all of them, by number or name.
            labels: A class for each; by default they take turns.
            seed: Another seed, other pictures.
            first: The number of the first picture.
            batch_size: Pictures drawn at once.
            size: Height and width in pixels, or one number for both; as in training by default.

        Raises:
            UserError: If a class does not exist, or the sampler cannot draw that size.
        """
        every, grid = self._labels(count, label, labels, first), self._grid(size)
        pieces = [
            self.tokenizer.images(
                self.sample_tokens(every[i : i + batch_size], seed=seed, first=first + i, grid=grid), grid
            )
            for i in range(0, count, batch_size)
        ]
        return torch.cat(pieces)

    @torch.no_grad()
    def complete(
        self,
        pictures: Tensor,
        mask: Tensor,
        *,
        labels: Sequence[int] | Tensor | None = None,
        seed: int = 0,
        first: int = 0,
        batch_size: int = 64,
    ) -> Tensor:
        """Draw the hidden part of pictures anew; returns images (B, 3, H, W) in [-1, 1].

        Codes are drawn row by row, each given the known and drawn ones before it. A hidden code therefore follows
        what is above it and to its left, and does not know of known codes below.

        Args:
            pictures: Images (B, 3, H, W), or their indices (B, h, w). A known code next to the border of the mask
                may have seen a few hidden pixels: an encoder looks further than one code.
            mask: True where the picture is known: (H, W) or (B, H, W) in pixels, or (h, w) or (B, h, w) in codes. A
                code is known where all of its pixels are.
            labels: The class of each; by default they take turns.
            seed: Another seed, other completions.
            first: The number of the first picture.
            batch_size: Pictures drawn at once.

        Raises:
            UserError: If the sampler cannot keep codes, or cannot draw a picture of this size.
        """
        indices = self._indices(pictures, batch_size)
        grid = (indices.shape[1], indices.shape[2])
        known = indices.masked_fill(~self._known(mask, indices), -1).flatten(1)
        every = self._labels(len(indices), None, labels, first)
        return torch.cat(
            [
                self.tokenizer.images(
                    self.sample_tokens(
                        every[i : i + batch_size],
                        seed=seed,
                        first=first + i,
                        grid=grid,
                        known=known[i : i + batch_size],
                    ),
                    grid,
                )
                for i in range(0, len(indices), batch_size)
            ]
        )

    @torch.no_grad()
    def sample_tokens(
        self,
        labels: Tensor,
        *,
        seed: int = 0,
        first: int = 0,
        grid: Size | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Draw token sequences (B, h * w), one for each of the labels (B,).

        Args:
            known: (B, h * w), tokens to keep, -1 where one is to be drawn.
        """
        self.eval()
        batch = Batch(labels=labels.to(self.device))
        null = getattr(self.conditioner, "null", None)
        offered = {"known": known, "null_prefix": null(batch) if null else None, "window": self.tokenizer.grid}
        wanted = inspect.signature(self.sampler).parameters
        grid = grid or self.tokenizer.grid
        self._check_sampler(grid, known is not None, wanted)
        given = {key: value for key, value in offered.items() if key in wanted}
        return self.sampler(self.prior, self.conditioner(batch), grid, seed=seed, first=first, **given)

    def _check_sampler(self, grid: Size, keeps: bool, wanted: Collection[str]) -> None:
        trained, stride = self.tokenizer.grid, self.tokenizer.stride
        if keeps and "known" not in wanted:
            raise UserError("sampler: this one cannot keep codes that are known; sampler=autoregressive does")
        # Fewer rows are the start of a sequence; fewer or more columns are another sequence.
        if "window" not in wanted and (grid[1] != trained[1] or grid[0] > trained[0]):
            asked, learned = (f"{each[0] * stride} x {each[1] * stride}" for each in (grid, trained))
            raise UserError(
                f"size: the prior has learned pictures of {learned} pixels, not {asked}; "
                "sampler=sliding_window draws larger ones"
            )

    def _grid(self, size: int | Sequence[int] | None) -> Size:
        if size is None:
            return self.tokenizer.grid
        stride, (height, width) = self.tokenizer.stride, _read_size(size)
        if height % stride or width % stride:
            near = [max(round(each / stride), 1) * stride for each in (height, width)]
            raise UserError(
                f"size=[{height},{width}]: the tokenizer's stride {stride} must divide it; "
                f"the nearest that fits is size=[{near[0]},{near[1]}]"
            )
        return height // stride, width // stride

    def _indices(self, pictures: Tensor, batch_size: int) -> Tensor:
        if not pictures.is_floating_point():
            return pictures.to(self.device)
        self.eval()
        return torch.cat([self.tokenizer.encode(each.to(self.device)) for each in pictures.split(batch_size)])

    def _known(self, mask: Tensor, indices: Tensor) -> Tensor:
        """Bring a mask of pixels or codes to the shape of the indices."""
        (height, width), stride = indices.shape[1:], self.tokenizer.stride
        mask = mask.to(indices.device, torch.bool).expand(len(indices), *mask.shape[-2:])
        if mask.shape[1:] == (height * stride, width * stride):
            return mask.unflatten(2, (width, stride)).unflatten(1, (height, stride)).all(dim=4).all(dim=2)
        if mask.shape[1:] != (height, width):
            raise ValueError(
                f"the mask must be ({height}, {width}) in codes or ({height * stride}, {width * stride}) in pixels, "
                f"not {tuple(mask.shape[1:])}"
            )
        return mask

    def _labels(self, count: int, label: int | str | None, labels: Sequence[int] | Tensor | None, first: int) -> Tensor:
        if labels is not None:
            chosen = torch.as_tensor(labels)
        elif label is not None:
            chosen = torch.full((count,), self.class_index(label))
        else:
            chosen = (torch.arange(count) + first) % max(len(self.classes), 1)
        if len(chosen) != count:
            raise UserError(f"labels: {len(chosen)} labels for {count} pictures")
        if self.classes and (chosen.min() < 0 or chosen.max() >= len(self.classes)):
            raise UserError(f"labels: classes are numbered 0 to {len(self.classes) - 1}")
        return chosen

    def class_index(self, label: int | str) -> int:
        """Return the number of a class given by number or name."""
        if isinstance(label, int) or str(label).isdigit():
            if int(label) not in range(len(self.classes)):
                raise UserError(f"label={label}: {unknown('class', label, range(len(self.classes)))}")
            return int(label)
        if label not in self.classes:
            raise UserError(f"label={label}: {unknown('class', label, self.classes)}")
        return self.classes.index(label)


def _read_size(size: int | Sequence[int]) -> Size:
    try:
        height, width = pair(size)
    except (TypeError, ValueError) as error:
        raise UserError(f"size={size}: give one number, or two as size=[512,768]") from error
    if height < 1 or width < 1:
        raise UserError(f"size=[{height},{width}]: a picture has at least one pixel")
    return height, width
