"""Does the aligned policy answer better than the first one? Both answer the held-out queries, and a judge decides.

    7-answers/data.parquet    the aligned policy's answer as chosen, the first policy's as rejected
    7-answers/verdicts.parquet

Left out on purpose: benchmarks; and several answers a query.
"""

from selfsteer.engines.base import Failed, Request, Sampling
from selfsteer.engines.open import sampler_digest
from selfsteer.engines.sampling import request, response, sample, seed_for
from selfsteer.judges.find import RecipeJudge, ask
from selfsteer.measures.verdicts import Verdict
from selfsteer.pairs import answer_pair
from selfsteer.recipe.engines import sampling_identity
from selfsteer.records import Dropped, Pair, Query
from selfsteer.stages.base import Round, Work, held_out, inputs_of, make_stage
from selfsteer.stages.quality import read_verdicts, reopen_unanswered, verdict_row, write_verdicts
from selfsteer.stages.responses import sampler_of
from selfsteer.stages.training import model_of
from selfsteer.store import columns
from selfsteer.store.folder import Contents, Origin, Stage

ANSWERS = "7-answers"


def answers_stage(round: Round, principles: Stage, policy: Stage) -> Stage | None:
    """The held-out queries answered by the aligned and by the first policy, judged; None without a judge."""
    judge = round.judge
    if judge is None:
        return None
    settings = {
        "responses": round.recipe.responses.steered.model_dump(),
        "judge": judge.settings(),
        "holdout": round.recipe.queries.holdout,
        "seed": round.recipe.seed,
        **sampling_identity(round.recipe.engine),
    }
    inputs = inputs_of(round, principles=principles, aligned=policy) | judge.inputs()
    origin = Origin(settings=settings, inputs=inputs)
    reopen_unanswered(round.folder.stage(round.number, ANSWERS), origin)
    return make_stage(round, ANSWERS, origin, lambda work: _answers(round, work, _Asked(round, principles, policy), judge))


class _Asked:
    """The questions to both policies."""

    def __init__(self, round: Round, principles: Stage, policy: Stage) -> None:
        wanted = held_out(round)
        self.round = round
        self.queries = [columns.query(row) for row in principles.rows() if row["query_id"] in wanted]
        self.models = (model_of(policy), round.policy)
        """The aligned policy, the first one."""

    def request(self, query: Query, number: int) -> Request:
        """The bare query, with the same seed for both."""
        recipe = self.round.recipe
        return request(
            self.round.prompts,
            query.messages,
            model_digest=sampler_digest(recipe.engine, self.models[number]),
            sampling=Sampling(**recipe.responses.steered.model_dump()),
            seed=seed_for(recipe.seed, "answer", query.id),
        )


def _answers(round: Round, work: Work, asked: _Asked, judge: RecipeJudge) -> Contents:
    for number, model in enumerate(asked.models):
        wanted = (asked.request(query, number) for query in asked.queries)
        sample(
            sampler_of(round, {"answer": model}),
            wanted,
            work.journal,
            description="answers of the aligned policy" if number == 0 else "answers of the first policy",
            total=len(work.journal) + len(asked.queries),
        )
    dropped: list[Dropped] = []
    pairs: list[Pair] = []
    for query in asked.queries:
        after, before = (response(work.journal, asked.request(query, number)) for number in range(2))
        if isinstance(after, Failed) or isinstance(before, Failed):
            dropped.append(Dropped(id=query.id, reason="no answer"))
        else:
            pairs.append(answer_pair(query, after, before))

    verdicts = ask(judge, lambda: pairs, work.journal, total=len(pairs))
    found = (verdict_row("alignment", "judge", verdict) for verdict in verdicts)
    files = write_verdicts(work.stage, found)

    rows = map(columns.pair_row, pairs)
    return Contents(wanted=len(asked.queries), rows=rows, dropped=dropped, schema=columns.PAIRS, files=files)


def win_verdicts(stage: Stage) -> list[Verdict]:
    """The sealed verdicts: "chosen" is the aligned policy."""
    return read_verdicts(stage)["alignment"]["judge"]
