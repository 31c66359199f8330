"""Checkpoints that appear as a whole, the old ones going only then."""
import os.path as osp
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import join_path
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..files import WholeFiles, write_text
from ..resume import INTERRUPTED, LAST


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHook):
    """MMEngine's CheckpointHook, for trainings that may be killed at any moment.

    A checkpoint is written beside its place and renamed when it is on the disk, and ``last_checkpoint`` likewise; only
    then older ones are removed. MMEngine removes first, and a full disk or a kill can leave a training with nothing.

    It takes CheckpointHook's arguments. Files elsewhere than on a local disk are left to MMEngine.
    """

    saved: tuple[int, int] | None = None
    """Epoch and iteration of the last checkpoint."""

    def before_train(self, runner: Runner) -> None:
        local = self.backend_args is None and self.file_client_args is None and '://' not in str(
            self.out_dir or runner.work_dir)
        if local:
            self.backend_args = dict(backend='whole')
        super().before_train(runner)
        self._clear()

    def save_interrupted(self, runner: Runner, epoch: int, iteration: int) -> str:
        """Save a training that has come to this point, unless that is done; the file's path."""
        if self.saved != (epoch, iteration):
            self._save(runner, INTERRUPTED, dict(epoch=epoch, iter=iteration), by_epoch=False)
        return self.last_ckpt

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                self._outdate(self.filename_tmpl.format(self.keep_ckpt_ids[0]))
            self.keep_ckpt_ids.append(step)  # a deque that drops the first
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        self._outdate(INTERRUPTED)
        self._save(runner, self.filename_tmpl.format(step), meta, self.by_epoch)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, Any]) -> None:
        super()._save_best_checkpoint(runner, metrics)
        self._clear()

    def _save(self, runner: Runner, name: str, meta: dict[str, Any], by_epoch: bool) -> None:
        """Write a checkpoint, name it as the last one, and remove what is outdated."""
        self.last_ckpt = join_path(self.out_dir, name, backend_args=self.backend_args)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(self.out_dir, name, self.file_client_args, save_optimizer=self.save_optimizer,
                               save_param_scheduler=self.save_param_scheduler, meta=meta, by_epoch=by_epoch,
                               backend_args=self.backend_args, **self.args)
        self.saved = meta['epoch'], meta['iter']
        if is_main_process():
            write_text(osp.join(runner.work_dir, LAST), self.last_ckpt)
        self._clear()

    def _outdate(self, name: str) -> None:
        path = self.file_backend.join_path(self.out_dir, name)
        if is_main_process() and self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif is_main_process() and self.file_backend.isdir(path):  # DeepSpeed's checkpoints
            self.file_backend.rmtree(path)

    def _clear(self) -> None:
        if isinstance(self.file_backend, WholeFiles):
            best = [getattr(self, 'best_ckpt_path', None), *getattr(self, 'best_ckpt_path_dict', {}).values()]
            self.file_backend.clear(but=[self.last_ckpt, *best])
