"""Does the aligned policy answer better than the first one? Both answer the held-out queries, and a judge decides.

    7-answers/data.parquet    the aligned policy's answer as chosen, the first policy's as rejected
    7-answers/verdicts.parquet

Left out on purpose: benchmarks; and several answers a query.
"""

from selfsteer.engines.base import Request
from selfsteer.judges.base import RecipeJudge
from selfsteer.judges.find import ask
from selfsteer.pairs import answer_pair
from selfsteer.recipe.engines import sampling_identity
from selfsteer.records import Dropped, Pair
from selfsteer.stages.base import Round, Work, inputs_of, make_stage
from selfsteer.stages.drawing import held_out
from selfsteer.stages.quality import reopen_unanswered, verdict_row, write_verdicts
from selfsteer.stages.responses import answer_request, answers_to, sample_answers
from selfsteer.stages.status import ANSWERS
from selfsteer.stages.training import model_of
from selfsteer.store import columns
from selfsteer.store.folder import Contents, Origin, Stage


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
    return make_stage(round, ANSWERS, origin, lambda work: _answers(round, work, principles, policy, judge))


def _answers(round: Round, work: Work, principles: Stage, policy: Stage, judge: RecipeJudge) -> Contents:
    spared = held_out(round)
    queries = [columns.query(row) for row in principles.rows() if row["query_id"] in spared]
    asked: list[list[Request]] = []
    for whose, model in (("aligned", model_of(policy)), ("first", round.policy)):
        asked.append([answer_request(round, model, query) for query in queries])
        sample_answers(round, work, model, asked[-1], whose=whose)
    items: list[Pair | Dropped] = []
    for query, after, before in zip(queries, *asked, strict=True):
        answers = answers_to(work.journal, query.id, {"after": after, "before": before})
        if isinstance(answers, Dropped):
            items.append(Dropped(id=query.id, reason="no answer"))
        else:
            items.append(answer_pair(query, answers["after"], answers["before"]))

    pairs = [item for item in items if isinstance(item, Pair)]
    verdicts = ask(judge, lambda: pairs, work.journal, total=len(pairs))
    found = (verdict_row("alignment", "judge", verdict) for verdict in verdicts)
    files = write_verdicts(work.stage, found)

    rows = (item if isinstance(item, Dropped) else columns.pair_row(item) for item in items)
    return Contents(wanted=len(queries), rows=rows, schema=columns.PAIRS, files=files)
