"""ETW as a trainer of OpenUnlearning: GradDiff with etw.py's weights on the forget tokens."""
from trainer.unlearn.grad_diff import GradDiff

import etw


class ETW(GradDiff):
    """gamma · L_f + alpha · L_r; gamma is the paper's λ, retain_loss_type is GradDiff's.

    temperature: T of the entropy; weighting: of etw.WEIGHTINGS, but for keep, tnpo,
    npo and spans, which need more than the model; beta: a list of its β's, empty for the defaults.
    """

    def __init__(self, *args, temperature=1.0, weighting="etw", beta=(), **kwargs):
        super().__init__(*args, **kwargs)
        self.temperature, self.weighting, self.beta = temperature, weighting, beta

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        # The collator also brings `index`, which no model takes.
        names = "input_ids", "attention_mask", "labels"
        forget, retain = ({n: inputs[kind][n] for n in names} for kind in ("forget", "retain"))
        labels = forget.pop("labels")
        outputs = model(**forget)
        logprobs, entropy, mask = etw.label_stats(outputs.logits, labels, self.temperature)
        weights = etw.weigh(self.weighting, etw.Tokens(logprobs, entropy, mask), *self.beta)
        loss = self.gamma * etw.forget_loss(logprobs, weights, mask)
        loss = loss + self.alpha * self.compute_retain_loss(model=model, retain_inputs=retain)
        return (loss, outputs) if return_outputs else loss
