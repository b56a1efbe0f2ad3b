"""The trunks of a batch: prefixes that contexts share, contexts, and continuations without their last blocks.

The KV of a trunk is computed behind the KV of the trunk before: a context behind its prefix, a continuation behind its
context. Several continuations of one context share the context's trunk, and the masked copies of their first block.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sdar_lm_eval.engines.native.scoring.batches import Tokens, shared_prefixes
from sdar_lm_eval.engines.native.scoring.forwards import SCRATCH_SLOT
from sdar_lm_eval.engines.native.scoring.rows import Trunk
from sdar_lm_eval.likelihood import ScorePlan


@dataclass(frozen=True)
class Share:
    """A plan's share of a batch.

    Attributes:
        begin, end: the plan's answers are those with begin <= index < end.
        clean_tokens, noised_tokens: tokens that run for the plan. Tokens that several plans share count for the first.
    """

    begin: int
    end: int
    clean_tokens: int
    noised_tokens: int


@dataclass(frozen=True)
class Trunks:
    """The trunks of a batch.

    Attributes:
        prefixes, contexts, continuations: the trunks of each kind, which need the KV of the kinds before.
        shares: each plan's share of the batch, in the order of the plans.
    """

    prefixes: list[Trunk]
    contexts: list[Trunk]
    continuations: list[Trunk]
    shares: list[Share]

    @classmethod
    def of(cls, plans: Sequence[ScorePlan], length: int, mask_token_id: int, least_saved: int) -> Trunks:
        """Lay out the trunks of plans, with the masked copies of their blocks.

        Args:
            plans: the plans of a batch.
            length: tokens of a block.
            mask_token_id: the token at masked positions.
            least_saved: fewest tokens that shared prefixes must save.
        """
        prefix_of = shared_prefixes((plan.context for plan in plans), length, least_saved)
        plans_of = Counter(plan.context for plan in plans)
        prefixes: dict[Tokens, Trunk] = {}
        contexts: dict[Tokens, Trunk] = {}
        continuations, shares = [], []
        free = itertools.count(SCRATCH_SLOT + 1)
        answers = 0

        def trunk_behind(before: list[int], tokens: Tokens) -> Trunk:
            return Trunk(before, tokens, before + list(itertools.islice(free, len(tokens))))

        for plan in plans:
            begin, clean, noised = answers, len(plan.clean), 0
            context = contexts.get(plan.context)
            if context is None:
                prefix = prefix_of[plan.context]
                if prefix not in prefixes:
                    prefixes[prefix] = trunk_behind([], prefix)
                    clean += len(prefix)
                context = trunk_behind(prefixes[prefix].kv_slots, plan.context[len(prefix) :])
                contexts[plan.context] = context
                clean += len(context.tokens)
            continuation = trunk_behind(context.kv_slots, plan.clean)
            continuations.append(continuation)
            for block in plan.blocks:
                # Copies of the first block see only the context, so several continuations may share these copies.
                first = block.start == len(plan.context)
                trunk, shares_copies = (context, plans_of[plan.context] > 1) if first else (continuation, False)
                noised += length * trunk.add(block, answers, mask_token_id, shares=shares_copies)
                answers += len(block.patterns)
            shares.append(Share(begin, answers, clean, noised))
        return cls(list(prefixes.values()), list(contexts.values()), continuations, shares)
