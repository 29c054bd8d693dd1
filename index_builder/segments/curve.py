"""How much each amount of work was measured to find, and which amount a request is given."""

from dataclasses import dataclass

from index_builder.segments.index_spec import Effort


@dataclass(frozen=True, slots=True)
class Curve:
    """What was measured of one index, least work first."""

    #: What the index calls an amount of work, and the recall@10 it has with that; neither ever falls.
    rungs: tuple[tuple[float, float], ...]

    def knob(self, effort: Effort, default_recall: float) -> float | None:
        """How hard to look; None where nothing measured reaches the recall asked for: compare with all.

        default_recall: what to reach, as far as possible, where `effort` names neither share nor recall.
        """
        if effort.share is not None:
            return self.rungs[round(effort.share * (len(self.rungs) - 1))][0]
        wanted = default_recall if effort.recall is None else effort.recall
        for knob, recall in self.rungs:
            if recall >= wanted:
                return knob
        return self.rungs[-1][0] if effort.recall is None else None
