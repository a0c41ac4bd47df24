"""The points of a curve, few enough to draw: memory does not grow with their number."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

Point = tuple[float, float]  # (step, value)

MAX_BUCKETS = 500  # even


class Bucket:
    """Successive points: their means, the lowest and the highest."""

    __slots__ = ("count", "highest", "lowest", "step_sum", "value_sum")

    def __init__(self, point: Point) -> None:
        self.count, self.lowest, self.highest = 1, point, point
        self.step_sum, self.value_sum = point

    def add(self, step: float, value: float) -> None:
        self.count += 1
        self.step_sum += step
        self.value_sum += value
        if value < self.lowest[1]:
            self.lowest = (step, value)
        if value > self.highest[1]:
            self.highest = (step, value)

    def merge(self, later: "Bucket") -> "Bucket":
        self.count += later.count
        self.step_sum += later.step_sum
        self.value_sum += later.value_sum
        self.lowest = min(self.lowest, later.lowest, key=lambda point: point[1])
        self.highest = max(self.highest, later.highest, key=lambda point: point[1])
        return self


class Curve:
    """Every point of a curve of up to `MAX_BUCKETS`, else the lowest and highest of as many ranges of points.

    When all buckets are full, neighbours are merged.
    """

    def __init__(self, points: Iterable[Point] = ()) -> None:
        self.buckets: list[Bucket] = []
        self.bucket_size = 1  # points
        self.last: Point | None = None
        for step, value in points:
            self.add(step, value)

    def __len__(self) -> int:
        return sum(bucket.count for bucket in self.buckets)

    def add(self, step: float, value: float) -> None:
        self.last = (step, value)
        if self.buckets and self.buckets[-1].count < self.bucket_size:
            self.buckets[-1].add(step, value)
            return
        if len(self.buckets) == MAX_BUCKETS:
            self.buckets = [first.merge(second) for first, second in list(pairwise(self.buckets))[::2]]
            self.bucket_size *= 2
        self.buckets.append(Bucket(self.last))

    @property
    def points(self) -> list[Point]:
        """At most twice `MAX_BUCKETS`, in order, the last one included."""
        extremes = (sorted({bucket.lowest, bucket.highest}) for bucket in self.buckets)
        points = [point for bucket in extremes for point in bucket]
        if self.last is not None and self.last != points[-1]:
            points.append(self.last)
        return points

    def means(self, bins: int) -> list[Point]:
        """Return the mean points of at most so many ranges of the curve."""
        size = -(-len(self.buckets) // bins)
        groups = [self.buckets[i : i + size] for i in range(0, len(self.buckets), size)]
        return [_mean(group) for group in groups]


def _mean(buckets: Sequence[Bucket]) -> Point:
    count = sum(bucket.count for bucket in buckets)
    return sum(each.step_sum for each in buckets) / count, sum(each.value_sum for each in buckets) / count
