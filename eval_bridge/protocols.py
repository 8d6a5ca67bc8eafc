"""How a number is got: shots, precision, BOS. Numbers of different protocols don't compare.

`paper` is how the paper's Tables 2 and 3 and Figure 2 were made (sections 3.1 and 3.2, and the original's
EVAL.md); `current` is what lm-eval does when nothing is said.
"""

import dataclasses

_SHOTS = {'mmlu': 5, 'bbh_fewshot': 3, 'bbh_cot_fewshot': 3, 'drop': 3}  # of Table 3, and of what they consist of
_OWN_SHOTS = 'instructeval_'  # tasks with a protocol of their own


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What decides a score besides the model and the task.

    Attributes:
      zero_shot: tasks are zero-shot, those of Table 3 as there; else as their files say.
      dtype: of the computation, float32; auto: the checkpoint's.
      add_bos: whether BOS comes before every text; None: as the model's tokenizer is set.
    """

    name: str
    zero_shot: bool
    dtype: str
    add_bos: bool | None

    def num_fewshot(self, task: str) -> int | None:
        """Examples before each question of a task or group; None: what its file says."""
        if not self.zero_shot or task.startswith(_OWN_SHOTS):
            return None
        return next((shots for name, shots in _SHOTS.items() if task == name or task.startswith(f'{name}_')), 0)


PAPER = Protocol('paper', zero_shot=True, dtype='float32', add_bos=False)
CURRENT = Protocol('current', zero_shot=False, dtype='auto', add_bos=None)
PROTOCOLS = {protocol.name: protocol for protocol in (PAPER, CURRENT)}
