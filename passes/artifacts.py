"""What a compile leaves behind for tools: structured-trace artifacts and dumps."""

from ringcompile.config import Environment
from ringcompile.passes.pipeline import Rewritten
from ringcompile.torch_private import emit_structured_trace


def emit_artifacts(made: Rewritten, *, rank: int) -> None:
    """Write the graph after each pass, and every schedule, to trace and dump folder.

    Args:
        made: what the passes made.
        rank: named in file names, since ranks share a folder.
    """
    texts = {
        f"{i:02d}.{name}": text for i, (name, text) in enumerate(made.texts.items())
    }
    schedules = {a.plan.schedule: a.plan.name for a in made.attentions}
    texts["schedules"] = "\n".join(f"{name}\n{s}" for s, name in schedules.items())
    folder = Environment.read().dump_dir
    for name, text in texts.items():
        emit_structured_trace(f"ringcompile.{name}", text)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank{rank}.{name}.txt").write_text(text)
