"""Log-likelihoods on the device: requests -> plans -> batches -> clean forwards, masked forwards -> results.

A batch holds contexts with their continuations. First, the clean tokens run under the block-causal mask, and their KV
is stored. The prefixes that contexts share run first. Then the rest of each context runs, once for all of its
continuations. Then the continuations run, without their last blocks.

Last, the masked copies of all blocks run. Each copy sees its clean prefix and itself. Only positions with a query go
through the LM head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from sdar_lm_eval import likelihood
from sdar_lm_eval.engines.native import unmasking
from sdar_lm_eval.engines.native.forward.base import Forward
from sdar_lm_eval.engines.native.scoring.batches import Limits, divide
from sdar_lm_eval.engines.native.scoring.forwards import ModulesRows, RowsForward
from sdar_lm_eval.engines.native.scoring.rows import ForwardRow, clean_rows, laid_out, packed, spans
from sdar_lm_eval.engines.native.scoring.trunks import Trunks
from sdar_lm_eval.engines.native.transfer import to_device
from sdar_lm_eval.engines.runs import Failures, not_finite
from sdar_lm_eval.engines.types import LikelihoodConfig, ScoreRequest, ScoreResult


class Scoring:
    """Scores requests with one model.

    Args:
        forward: runs the rows of clean tokens and of masked copies.
        mask_token_id: the mask token, whose probability is 0.
        limits: the limits of batches and forwards.
    """

    def __init__(self, forward: RowsForward, mask_token_id: int, limits: Limits) -> None:
        self._forward, self._mask_token_id, self._limits = forward, mask_token_id, limits

    def run(
        self, requests: Sequence[ScoreRequest], config: LikelihoodConfig, failures: Failures
    ) -> Iterator[tuple[int, ScoreResult]]:
        """See `Scorer.score`; `failures` gets the requests whose scores are not finite."""
        batches = divide(requests, config, self._mask_token_id, self._limits)
        for index, request in enumerate(requests):
            if self._mask_token_id in request.continuation_ids:
                yield index, ScoreResult(log_likelihood=-math.inf, is_greedy=False)
        self._forward.allocate(max((batch.clean_tokens for batch in batches), default=0))
        for batch in batches:
            plans = [likelihood.plan(requests[index], config, self._mask_token_id) for index in batch.requests]
            unscored = []
            results = self._run_batch(plans, config.block_length)
            for index, single, result in zip(batch.requests, plans, results, strict=True):
                if result is None:
                    unscored.append((index, single))
                else:
                    yield index, result
            # NaN spreads to all rows of a forward, even through masked tokens (0 * NaN is NaN). So each request without
            # a finite score runs once more, without the others.
            for index, single in unscored:
                self._forward.clear()
                (result,) = self._run_batch([single], config.block_length) if len(plans) > 1 else (None,)
                if result is None:
                    failures.add(index, not_finite(str(self._forward.dtype)))
                else:
                    yield index, result
            if unscored:
                self._forward.clear()

    def _run_batch(self, plans: list[likelihood.ScorePlan], length: int) -> list[ScoreResult | None]:
        """Run one batch; results in the order of the plans, None where a score is not finite."""
        trunks = Trunks.of(plans, length, self._mask_token_id, self._limits.least_saved)
        for kind in (trunks.prefixes, trunks.contexts, trunks.continuations):
            for rows in clean_rows(kind, length, self._limits.clean_row_tokens):
                for rows_at_once in packed(rows, self._limits):
                    self._forward.run(rows_at_once)
        answers = trunks.shares[-1].end
        sums, is_argmax = np.zeros(answers), np.zeros(answers, dtype=np.bool_)
        branching = (*trunks.contexts, *trunks.continuations)
        copies = [span for trunk in branching for span in spans(trunk, length, self._limits.row_tokens)]
        for spans_at_once in packed(copies, self._limits):
            masked = [laid_out(span, self._mask_token_id) for span in spans_at_once]
            self._forward.run(masked)
            self._read_log_probabilities(masked, sums, is_argmax)
        results: list[ScoreResult | None] = []
        for plan, share in zip(plans, trunks.shares, strict=True):
            own = slice(share.begin, share.end)
            tokens = {"clean_tokens": share.clean_tokens, "noised_tokens": share.noised_tokens}
            finite = np.isfinite(sums[own]).all()
            results.append(plan.result(sums[own], is_argmax[own], **tokens) if finite else None)
        return results

    @torch.no_grad()
    def _read_log_probabilities(
        self, rows: list[ForwardRow], sums: NDArray[np.float64], is_argmax: NDArray[np.bool_]
    ) -> None:
        """Compute the log-probabilities of the last forward's queries.

        Args:
            rows: the rows of the forward.
            sums: written: each answer's sum of log-probabilities.
            is_argmax: written: whether each answer's first token is the most probable one.
        """
        row_of = np.repeat(np.arange(len(rows)), [row.queries.shape[1] for row in rows])
        index, token, number = np.concatenate([row.queries for row in rows], axis=1)
        at = np.stack([row_of, index], axis=1)  # (A, 2)
        at, which = np.unique(at, axis=0, return_inverse=True)  # several answers may have a query at one position
        which = which.reshape(-1)
        order = np.argsort(which, kind="stable")
        token, number, which = token[order], number[order], which[order]
        log_probabilities, hits = np.zeros(len(which)), np.zeros(len(which), dtype=np.bool_)
        chunk = unmasking.rows_at_once(self._forward.vocabulary)
        for start in range(0, len(at), chunk):
            logits = self._forward.logits(*at[start : start + chunk].T).float()  # (R, V)
            logits[:, self._mask_token_id] = -torch.inf
            begin, end = np.searchsorted(which, (start, start + chunk))
            position, asked = (to_device(x, logits.device) for x in (which[begin:end] - start, token[begin:end]))
            values = logits[position, asked] - logits.logsumexp(dim=-1)[position]
            hit = logits.argmax(dim=-1)[position] == asked
            log_probabilities[begin:end] = values.double().cpu().numpy()
            hits[begin:end] = hit.cpu().numpy()
        # math.fsum raises for inf and -inf; with NaN the sum is NaN.
        log_probabilities[~np.isfinite(log_probabilities)] = np.nan
        order = np.argsort(number, kind="stable")  # by answer, then by position
        numbers, firsts = np.unique(number[order], return_index=True)
        is_argmax[numbers] = hits[order][firsts]
        values = log_probabilities[order].tolist()
        ends = [*firsts[1:].tolist(), len(values)]
        sums[numbers] = [math.fsum(values[i:j]) for i, j in zip(firsts.tolist(), ends, strict=True)]


def rows_forward(model: PreTrainedModel, forward: Forward, block_length: int) -> RowsForward:
    """The forward of scoring: the fused decoder where it runs and takes blocks of this length, else the modules."""
    if not forward.captures or block_length > forward.longest_block:
        return ModulesRows(model)
    from sdar_lm_eval.engines.native.forward.fused import FusedForward
    from sdar_lm_eval.engines.native.scoring.fused import FusedRows

    assert isinstance(forward, FusedForward)
    return FusedRows(forward)
