"""Crash safety of `timm-dynamic train`: checkpoints that are whole or not there, and runs that repeat."""

import argparse
import csv
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from timm.utils import CheckpointSaver, is_primary
from torch.distributed import PrefixStore, Store

from timm_dynamic.cli.arguments.files import replacing
from timm_dynamic.cli.arguments.train import run_folder
from timm_dynamic.convert import read_checkpoint

_logger = logging.getLogger("timm_dynamic.cli.train")  # whose level the command sets

LAST, BEST = "last.pth.tar", "model_best.pth.tar"
_LEFTOVERS = (
    "tmp.pth.tar",
    ".*.pth.*.tar",
    ".summary.*.csv",
    ".args.*.yaml",
    ".routing.*.json",
)  # timm's, and those of `replacing`


class SafeSaver(CheckpointSaver):
    """timm's saver, such that no kill, power cut or full disk costs a checkpoint that was there before.

    timm takes `last.pth.tar` and the best model away before it puts new ones there, and renames a file that may not
    have reached the disk. Which checkpoints are kept, and their names, is left to timm.
    """

    _source: str | None = None

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        path = Path(save_path)
        path.unlink(missing_ok=True)  # of a killed run it can be a link to a checkpoint, which must not be written to
        if self._source:
            return self._duplicate(self._source, save_path)
        try:
            with open(path, "wb") as file:
                super()._save(file, epoch, metric)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)
        Path(src).unlink(missing_ok=True)  # POSIX leaves it there if both were links to one file
        sync(Path(dst).parent)

    def _duplicate(self, src: str, dst: str) -> None:
        with replacing(dst) as temporary:
            temporary.unlink(missing_ok=True)
            try:
                os.link(src, temporary)
            except OSError:  # a file system without hard links
                shutil.copy2(src, temporary)
                sync(temporary)

    @contextmanager
    def saving(self, epoch: int) -> Iterator[None]:
        """Around what an epoch writes.

        Raises:
            OSError: Something could not be written; in one line, with what there still is.
        """
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch.save's own error hides the system's
            cause: BaseException | None = error
            while cause and not isinstance(cause, OSError):
                cause = cause.__context__
            last, left = (
                Path(self.checkpoint_dir, LAST),
                "there is no earlier checkpoint: make room and repeat the command",
            )
            if last.exists():
                way = "auto" if self.args.experiment else last
                left = f"{last} holds epoch {read_checkpoint(last)['epoch']}: make room and go on with --resume {way}"
            reason = getattr(cause, "strerror", None) or error
            raise OSError(f"cannot save epoch {epoch} in {self.checkpoint_dir} ({reason}); {left}") from error

    def finish(self, path: str, epoch: int, metric: float | None) -> None:
        """Do what follows the writing of a checkpoint once more, for a run that may have been killed in between.

        Args:
            path: The checkpoint that the run goes on from, in the run's folder.
            epoch: Its epoch, which the history does not have yet.
            metric: Its metric.
        """
        self._source = path
        with self.saving(epoch):
            self.save_checkpoint(epoch, metric)
            best = Path(self.checkpoint_dir, f"checkpoint-{self.best_epoch}.pth.tar")
            if best.exists():
                self._duplicate(best, best.with_name(BEST))
        self._source = None


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_checkpoint(args: argparse.Namespace) -> str:
    """The path of the last whole checkpoint in the run's own folder, "" if there is none: `--resume auto`.

    Removes what a killed run left half-written. Several processes get the answer of the first.

    Raises:
        ValueError: The folder is not named, or flags contradict.
    """
    if not args.experiment:
        raise ValueError("--resume auto needs --experiment NAME, the run's own folder, to find its checkpoints again")
    if args.start_epoch is not None or args.no_resume_opt:
        flag = "--no-resume-opt" if args.no_resume_opt else "--start-epoch"
        raise ValueError(f"--resume auto goes on exactly where the run was: leave out {flag}")
    found = [""]
    if is_primary(args):
        folder = run_folder(args, args.experiment)
        for leftover in (file for pattern in _LEFTOVERS for file in folder.glob(pattern)):
            leftover.unlink()
        found = [next((str(path) for path in _newest_first(folder) if _is_whole(path)), "")]
        _logger.info(
            f"--resume auto: {f'from {found[0]}' if found[0] else f'no checkpoint in {folder}, from the start'}"
        )
    if args.distributed:
        torch.distributed.broadcast_object_list(found)
    return found[0]


def _newest_first(folder: Path) -> list[Path]:
    numbers = {
        path: path.name.removeprefix("checkpoint-").split(".")[0] for path in folder.glob("checkpoint-*.pth.tar")
    }
    numbered = sorted((path for path in numbers if numbers[path].isdecimal()), key=lambda path: -int(numbers[path]))
    return [path for path in (folder / LAST, *numbered, folder / BEST) if path.exists()]


def _is_whole(path: Path) -> bool:
    try:
        if not {"epoch", "state_dict", "optimizer"} <= read_checkpoint(path).keys():
            raise ValueError("it lacks what a run needs")
    except PermissionError:
        raise
    except Exception as error:  # a damaged archive fails in about every way there is
        _logger.warning(f"--resume auto: {path} is passed over ({type(error).__name__}: {error})")
        return False
    return True


def read_rows(summary: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns of a run's CSV file, and its rows; the last line may be cut short."""
    text = summary.read_text(errors="replace")
    reader = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    rows = [row for row in reader if None not in row.values() and (row.get("epoch") or "").isdecimal()]
    return list(reader.fieldnames or ()), rows


def write_rows(summary: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    with replacing(summary) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def reload_history(saver: SafeSaver, summary: Path, start: int, metric: str, resumed: str = "") -> None:
    """Let a run that goes on in its own folder know its best checkpoints, and drop rows of epochs it will repeat.

    Args:
        saver: Of the run.
        summary: The run's CSV file; its last line may be cut short.
        start: First epoch of this run.
        metric: The column that ranks the checkpoints.
        resumed: A checkpoint of epoch `start - 1` in the run's folder, whose saving may have been interrupted.
    """
    past: dict[int, float] = {}
    if summary.exists():
        columns, rows = read_rows(summary)
        rows = [row for row in rows if int(row["epoch"]) < start]
        if rows:
            write_rows(summary, columns, rows)
        else:  # a new run may have other columns
            summary.unlink()
        past = {int(row["epoch"]): float(row[metric]) for row in rows if row.get(metric)}
    latest = past.pop(start - 1, None) if resumed else None
    files = [(str(summary.with_name(f"checkpoint-{epoch}.pth.tar")), value) for epoch, value in past.items()]
    files = [(path, value) for path, value in files if Path(path).exists()]
    saver.checkpoint_files = sorted(files, key=lambda file: file[1], reverse=not saver.decreasing)
    if past:
        saver.best_epoch = (min if saver.decreasing else max)(past, key=past.get)
        saver.best_metric = past[saver.best_epoch]
    if resumed:
        saver.finish(resumed, start - 1, latest)


def rendezvous_of_attempt(url: str, **kwargs) -> Iterator[tuple[Store, int, int]]:
    """What torch.distributed starts with: torchrun's store, but not what an earlier attempt's processes left in it.

    torchrun keeps its store when it starts the processes again. A new process may then read a dead one's address.

    Args:
        url: `attempt://`, and what else would follow `env://`.
        **kwargs: As for `torch.distributed.rendezvous`.
    """
    for store, *place in torch.distributed.rendezvous(url.replace("attempt:", "env:"), **kwargs):
        yield PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store), *place


torch.distributed.register_rendezvous_handler("attempt", rendezvous_of_attempt)


@contextmanager
def repeatable(args: argparse.Namespace) -> Iterator[None]:
    """The context of a run; with `--deterministic`, one in which the same inputs give the same bits each time.

    Raises:
        ValueError: An operation has no deterministic form.
    """
    if not args.deterministic:
        yield
        return
    if args.distributed and args.no_ddp_bb and not (args.sync_bn or (args.dist_bn and args.val_split)):
        raise ValueError(
            "--deterministic: with --no-ddp-bb each process has BatchNorm statistics of its own, of which a checkpoint "
            "holds one: add --dist-bn reduce and validation, or leave out --no-ddp-bb"
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise ValueError(f"--deterministic: {str(error).split('. ')[0]}: train without the flag") from error
    finally:
        torch.use_deterministic_algorithms(before)
