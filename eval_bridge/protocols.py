"""Evaluation protocols: shots, precision, BOS. Numbers of different protocols don't compare.

`paper` is the protocol of the paper's Tables 2 and 3 and Figure 2 (sections 3.1 and 3.2, and the original's
EVAL.md); `current` is lm-eval with its own defaults.
"""

import dataclasses

_SHOTS = {'mmlu': 5, 'bbh_fewshot': 3, 'bbh_cot_fewshot': 3, 'drop': 3}  # Table 3's groups and their members
_OWN_SHOTS = 'instructeval_'  # tasks whose files set their shots


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Everything that decides a score besides the model and the task.

    Attributes:
      zero_shot: tasks are zero-shot, but Table 3's have the paper's shots; if false, each task's file decides.
      dtype: of the computation: float32, or auto for the dtype of the stored weights.
      add_bos: whether BOS comes before every text; None: the model's tokenizer decides.
    """

    name: str
    zero_shot: bool
    dtype: str
    add_bos: bool | None

    def num_fewshot(self, task: str) -> int | None:
        """Returns the number of examples before each question of a task or group; None: its file decides."""
        if not self.zero_shot or task.startswith(_OWN_SHOTS):
            return None
        return next((shots for name, shots in _SHOTS.items() if task == name or task.startswith(f'{name}_')), 0)


PAPER = Protocol('paper', zero_shot=True, dtype='float32', add_bos=False)
CURRENT = Protocol('current', zero_shot=False, dtype='auto', add_bos=None)
PROTOCOLS = {protocol.name: protocol for protocol in (PAPER, CURRENT)}
