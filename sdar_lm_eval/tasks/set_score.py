"""A score that knows the stage and the set of questions of its document.

Ranks send scores to each other. pickle finds a class by the name of its module, so this module is imported by its name:
lm-eval opens a task's module by the module's path, under a name that no other process may know.
"""

from __future__ import annotations


class SetScore(float):
    """The score of a document, 0.0 or 1.0.

    lm-eval hands scores to aggregations without their documents, and means over stages need the stages.

    Attributes:
        stage: the stage of the document.
        set: the document's set of questions.
    """

    stage: str = ""
    set: str = ""

    @classmethod
    def of(cls, stage: str, set_: str, right: bool) -> SetScore:
        """Return the score of an answer to a document of a set."""
        score = cls(right)
        score.stage, score.set = stage, set_
        return score
