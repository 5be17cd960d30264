"""lm-eval's tasks, from names to scores: ours, the ~14,000 that it ships, and files of the user.

Tasks are loaded (with their data) before any model is, so that a misspelt name or a data set that
is out of reach costs seconds. The network is only touched by tasks whose data lies on the Hugging
Face Hub; HF_HUB_OFFLINE=1 forbids that.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import math
import numbers
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import yaml
from lm_eval import evaluator
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.manager import TaskDict

from llmtrain_eval import ranks
from llmtrain_eval.adapter import LlmtrainLM

log = logging.getLogger(__name__)

OWN_TASKS = Path(__file__).parent / "tasks"
FEWSHOT_SEED = 1234  # lm-eval's default
BOOTSTRAP = 1000  # resamples for the standard error of scores that are no means


def load_tasks(
    names: Sequence[str],
    *,
    metadata: dict,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    others: Sequence[str] = (),
) -> TaskDict:
    """The tasks, groups or tags of these names (or task files), with their data.

    metadata: what our task files read (tokenizer_file, passkey, ...), given to every task.
    include_path: folder of further task files, which win over equal names. num_fewshot: examples
    before each question, where the task does not fix the number. others: names that are valid
    elsewhere, for the suggestions.
    ValueError naming an unknown task, or one whose data cannot be had, and what to do about it.
    """
    manager = find_manager(names, metadata, include_path, others)
    random.seed(0)  # some tasks shuffle answers with the global generators
    np.random.seed(0)
    loaded: TaskDict = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        with quiet("lm_eval.api.task"):
            one = load_one(manager, name)
        for part in loaded:
            loaded[part].update(one.get(part, {}))
    for task in loaded["tasks"].values():
        # A task file that fixes zero examples means it; lm-eval's command line agrees.
        fixed = task.get_config("num_fewshot")
        if fixed is None or (num_fewshot is not None and fixed != 0):
            task.set_config("num_fewshot", num_fewshot or 0)
        task.set_fewshot_seed(FEWSHOT_SEED)
    return loaded


def find_manager(
    names: Sequence[str], metadata: dict, include_path: str | None, others: Sequence[str]
) -> TaskManager:
    """An index that knows all names. lm-eval's own takes seconds to read, so it comes last."""
    folders = [OWN_TASKS]
    if include_path is not None:
        folders.append(check_folder(Path(include_path)))
    for include_defaults in (False, True):
        if include_defaults and ranks.rank() == 0:
            log.info("reading the index of lm-eval's tasks ...")
        with quiet("lm_eval.tasks"):
            manager = TaskManager(
                include_path=folders, include_defaults=include_defaults, metadata=metadata
            )
        unknown = [n for n in names if n not in manager.task_index and not Path(n).is_file()]
        if not unknown:
            return manager
    valid = [*manager.all_tasks, *others]
    near = {name: difflib.get_close_matches(name, valid, n=5, cutoff=0.6) for name in unknown}
    hints = "; ".join(f"{name}: nearest are {', '.join(n) or 'none'}" for name, n in near.items())
    raise ValueError(
        f"tasks: got the unknown {', '.join(unknown)}, expected names of lm-eval's tasks, groups "
        f"or tags, or of task files in include_path={include_path} ({hints}); "
        "`lm_eval ls tasks` lists lm-eval's"
    )


def check_folder(folder: Path) -> Path:
    """ValueError when the folder is missing or holds a file that is no task file: lm-eval would
    pass over it in silence."""
    files = sorted(folder.glob("**/*.yaml"))
    if not files:
        raise ValueError(
            f"include_path: got {folder}, expected a folder with task files (*.yaml); "
            "see eval/README.md for one"
        )
    for file in files:
        try:
            load_yaml(file, resolve_func=False)
        except (yaml.YAMLError, ValueError, OSError) as error:
            raise ValueError(
                f"include_path: {file} cannot be read as a task file ({error}); mend or move it"
            ) from error
    return folder


def load_one(manager: TaskManager, name: str) -> TaskDict:
    """One task, group or tag. Fetching fails in many ways: OSError for the network and the disk,
    RuntimeError for data sets that are scripts, ImportError for extras of lm-eval."""
    try:
        return manager.load([name])
    except ImportError as error:
        raise ValueError(f"task {name}: needs a package that is not installed: {error}") from error
    except (OSError, RuntimeError) as error:
        wanted = sorted(set(datasets_of(manager, name)))
        shown = ", ".join(wanted[:5]) + (", ..." if len(wanted) > 5 else "")
        raise ValueError(
            f"task {name}: its data set {shown} could not be loaded: {one_line(error)}. Expected "
            "it on the Hugging Face Hub or in its cache. Without a network, either copy the cache "
            "of a machine that has it (HF_HOME), or write a task file for a local copy "
            "(dataset_path: json, dataset_kwargs: {data_files: {test: FILE.jsonl}}) and give its "
            "folder as include_path; eval/README.md shows one"
        ) from error


def datasets_of(manager: TaskManager, member: object) -> Iterator[str]:
    """The data sets that a task, or the members of a group or tag, ask for."""
    if isinstance(member, dict):
        member = member.get("task") or member.get("group")
    entry = manager.task_index.get(member) if isinstance(member, str) else None
    if entry is None:
        return
    if entry.kind == Kind.TAG:
        for tagged in sorted(entry.tags):
            yield from datasets_of(manager, tagged)
        return
    config = load_yaml(entry.yaml_path, resolve_func=False)
    if entry.kind == Kind.GROUP:
        for inner in config["task"]:
            yield from datasets_of(manager, inner)
    elif path := config.get("dataset_path"):
        files = (config.get("dataset_kwargs") or {}).get("data_files")
        detail = config.get("dataset_name") or files
        yield f"{path} ({detail})" if detail else path


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Silence a logger's warnings: they explain lm-eval's command line, which is not used."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def evaluate(
    lm: LlmtrainLM, loaded: TaskDict, *, limit: int | None = None
) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """Scores by task and group, and lm-eval's logged samples by task; the same on every rank.

    A task's scores: metric -> value (None if not a number), "<metric>_stderr" -> its standard
    error, "samples", "shots".
    limit: items of a task, at most.
    """
    for name, task in loaded["tasks"].items():
        if (task.config.metadata or {}).get("refuse_truncation"):
            lm.refuse_truncation.add(name)
    # the other ranks do the same, silently
    screen = (
        contextlib.nullcontext() if ranks.rank() == 0 else contextlib.redirect_stderr(io.StringIO())
    )
    with screen:
        results = evaluator.evaluate(
            lm, loaded, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=True
        )
    assert results is not None  # lm-eval answers on its rank 0, which every rank is to it
    scores = {}
    for name, metrics in {**results["results"], **results.get("groups", {})}.items():
        flat = {}
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not filtered or not isinstance(value, numbers.Real):
                continue  # the alias, and standard errors that do not exist ("N/A")
            label = metric if filtered == "none" else f"{metric} ({filtered})"
            flat[label] = float(value) if math.isfinite(value) else None
        flat["samples"] = results["n-samples"].get(name, {}).get("effective")
        flat["shots"] = results["n-shot"].get(name)
        scores[name] = flat
    return scores, results["samples"]
