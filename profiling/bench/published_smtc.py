"""SMTC's training step as published: the tests and the benchmark ``smtc_step`` compare this project's step with it.

It computes what the paper (Qian et al. 2023, https://arxiv.org/abs/2308.09951) and the public code compute, from the
features of the backbones of student and teacher to the loss, in PyTorch's modules and without ``slotkernels``: the
correlation map of each frame with its partner, [M, M], and a linear layer over it; slot attention written out for both
stages; for each ordered pair of frames a kernel and a transport plan [B, M, M] of its own, and a loss [B, N, M, M];
SciPy on the host for each sample, semantic and pair.

Where paper and code disagree, an option chooses; its default is this project's.
"""

import copy
from itertools import permutations, product
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

if TYPE_CHECKING:  # the published computation needs nothing of this project's
    from interpreter.methods.smtc.model import Smtc

EPS = 1e-8  # of attention, of its sums, and of probabilities in a logarithm or a norm
COUNT_EPS = 1e-10  # of the count of each instance
Update = Literal["residual", "gru"]
Implicit = Literal["bilevel", "none"]
MaskOn = Literal["probabilities", "logits"]
SamplingGradient = Literal["none", "reparameterised"]
Marginals = Literal["uniform", "norm"]


class Correlation(nn.Module):
    """A linear layer over the correlation map; parameters are named as in ``CorrelationEmbedding``."""

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        layer = nn.Linear(tokens, dim)
        self.weight = nn.Parameter(layer.weight.detach().t().contiguous())  # [M, D]
        self.bias = nn.Parameter(layer.bias.detach())  # [D]

    def forward(self, features: Tensor, partners: Tensor) -> Tensor:
        """Embedding [B, T, M, D] of features [B, T, M, C] and those of each frame's partner."""
        correlation = features @ partners.mT  # [B, T, M, M]
        return correlation @ self.weight + self.bias


class SlotAttention(nn.Module):
    """Slot attention of both stages; parameters are named as in ``slotkernels.SlotAttention``."""

    def __init__(self, dim: int, hidden_dim: int, iterations: int, update: Update, implicit: Implicit) -> None:
        super().__init__()
        self.iterations, self.implicit = iterations, implicit
        self.norm_inputs, self.norm_slots, self.norm_mlp = (nn.LayerNorm(dim) for _ in range(3))
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim))
        self.gru = nn.GRUCell(dim, dim) if update == "gru" else None

    def keys_and_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, M, D] each, of tokens [B, T, M, D]; both stages use them."""
        x = self.norm_inputs(tokens)
        return self.to_k(x), self.to_v(x)

    def forward(self, k: Tensor, v: Tensor, initial: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Slots compete for tokens within their group.

        Args:
            k, v: [B, T, M, D].
            initial: slots [B, T, G, S, D] of G groups.
            mask: [B, T, G, M] bool, the tokens of each group; None for all of them.

        Returns:
            slots [B, T, G, S, D], and logits [B, T, G, S, M] of the last iteration.
        """
        slots = initial
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.implicit == "none"):
            for _ in range(self.iterations - 1):
                slots, _ = self.step(k, v, slots, mask)
        if self.implicit == "bilevel":
            slots = slots.detach() + (initial - initial.detach())  # the gradient of the slots before the last iteration
        return self.step(k, v, slots, mask)

    def step(self, k: Tensor, v: Tensor, slots: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """One iteration."""
        q = self.to_q(self.norm_slots(slots))
        logits = torch.einsum("btgsd,btmd->btgsm", q, k) * q.shape[-1] ** -0.5
        attention = logits.softmax(3) + EPS
        if mask is None:
            weights = attention / attention.sum(-1, keepdim=True)
        else:
            attention = attention * mask.unsqueeze(3)
            weights = attention / (attention.sum(-1, keepdim=True) + EPS)
        updates = torch.einsum("btgsm,btmd->btgsd", weights, v)
        if self.gru is None:
            slots = slots + updates
        else:
            slots = self.gru(updates.flatten(0, 3), slots.flatten(0, 3)).view_as(slots)
        return slots + self.mlp(self.norm_mlp(slots)), logits


class Found(NamedTuple):
    """What a branch finds in clips."""

    slots: Tensor  # [B, T, N, D], of semantics
    logits: Tensor  # [B, T, N, M], of semantics
    instances: Tensor  # [B, T, N, P, D]
    instance_logits: Tensor  # [B, T, N, P, M]
    projected: Tensor  # [B, T, N, P, D], instances after the head, of length 1


class Branch(nn.Module):
    """Student or teacher without its backbone. Arguments as of `PublishedSmtc`."""

    def __init__(
        self,
        num_semantics: int,
        dim: int,
        feature_dim: int,
        tokens: int,
        slot_attention: SlotAttention,
        threshold: float,
        mask_on: MaskOn,
        sampling_gradient: SamplingGradient,
        project_features: bool,
    ) -> None:
        super().__init__()
        self.threshold, self.mask_on, self.sampling_gradient = threshold, mask_on, sampling_gradient
        self.correlation = Correlation(tokens, dim)
        self.to_features = nn.Linear(feature_dim, dim) if project_features else None
        self.slot_attention = slot_attention
        self.mu = nn.Parameter(torch.randn(num_semantics, dim))
        self.log_sigma = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, num_semantics, 1, dim))[0, :, 0])
        self.head = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, features: Tensor, partners: Tensor, noise: Tensor) -> Found:
        """Find semantics and their instances.

        Args:
            features: [B, T, M, C].
            partners: [B, T] int64, the number of each frame's partner in its clip.
            noise: [B, T, N, P, D] standard normal.
        """
        batch, frames = partners.shape
        of_partners = features[torch.arange(batch, device=features.device).unsqueeze(1), partners]
        tokens = features if self.to_features is None else self.to_features(features)
        tokens = tokens + self.correlation(features, of_partners)
        k, v = self.slot_attention.keys_and_values(tokens)

        slots, logits = self.slot_attention(k, v, self.mu.expand(batch, frames, 1, -1, -1))
        slots, logits = slots.squeeze(2), logits.squeeze(2)

        initial = self.mu.unsqueeze(1) + self.log_sigma.exp().unsqueeze(1) * noise
        if self.sampling_gradient == "none":
            initial = initial.detach()
        mask = (logits.softmax(2) if self.mask_on == "probabilities" else logits) > self.threshold
        instances, instance_logits = self.slot_attention(k, v, initial, mask)
        projected = F.normalize(self.head(instances), dim=-1)
        return Found(slots, logits, instances, instance_logits, projected)


def transport_plan(cost: Tensor, a: Tensor, b: Tensor, eps: float, rounds: int) -> Tensor:
    """Entropic transport plan [B, M, L] after some rounds of Sinkhorn's scaling; its columns sum to b.

    Args:
        cost: [B, M, L].
        a, b: [B, M] and [B, L], each row sums to 1.
        eps: weight of the entropy.
        rounds: of row and column updates.
    """
    kernel = (-cost / eps).exp()
    beta = torch.ones_like(b)
    for _ in range(rounds):
        alpha = a / (kernel @ beta.unsqueeze(-1)).squeeze(-1)
        beta = b / (kernel.mT @ alpha.unsqueeze(-1)).squeeze(-1)
    return alpha.unsqueeze(-1) * kernel * beta.unsqueeze(-2)


def plan_between(x: Tensor, y: Tensor, marginals: Marginals, eps: float, rounds: int) -> Tensor:
    """Transport plan [B, M, L] between tokens of length 1, [B, M, C] and [B, L, C]."""
    a, b = ((t.abs().sum(-1) if marginals == "norm" else torch.ones_like(t[..., 0])) for t in (x, y))
    a, b = (t / t.sum(-1, keepdim=True) for t in (a, b))
    return transport_plan(1 - x @ y.mT, a, b, eps, rounds)


def semantic_loss(probabilities: Tensor, teacher_probabilities: Tensor, plans: dict[tuple[int, int], Tensor]) -> Tensor:
    """Cross-entropy of a frame's semantics with those that are transported from each other frame.

    Args:
        probabilities: [B, T, N, M], of the student.
        teacher_probabilities: [B, T, N, M].
        plans: [B, M, M] from frame i to frame j, by (i, j).
    """
    losses = []
    for (i, j), plan in plans.items():
        logarithms = (probabilities[:, i] + EPS).log().unsqueeze(3)  # [B, N, M, 1]
        cross_entropy = -teacher_probabilities[:, j].unsqueeze(2) * logarithms  # [B, N, M, M]
        losses.append((plan.unsqueeze(1) * cross_entropy).sum((1, 2, 3)).mean())
    return torch.stack(losses).mean()


def overlap(probabilities: Tensor) -> Tensor:
    """Mean cosine similarity of the masks [B, T, N, M] of two semantics."""
    masks = F.normalize(probabilities + EPS, dim=-1)
    similarity = masks @ masks.mT  # [B, T, N, N]
    others = ~torch.eye(masks.shape[2], dtype=torch.bool, device=masks.device)
    return similarity[:, :, others].mean()


def valid_instances(found: Found, threshold: float, least_share: float, least_similarity: float) -> Tensor:
    """Which instances count [B, T, N, P] bool: those of a semantic that is large enough, and similar to it."""
    share = (found.logits.softmax(2) > threshold).to(found.logits.dtype).mean(-1)  # [B, T, N]
    similarity = F.cosine_similarity(found.slots.unsqueeze(3), found.instances, dim=-1)
    return (share > least_share).unsqueeze(-1) & (similarity > least_similarity)


@torch.compiler.disable  # on the host
def match(similarity: Tensor) -> Tensor:
    """The column of each row [B, N, P] in the best assignment of each matrix of similarities [B, N, P, P]."""
    costs = (1 - similarity.detach()).cpu().numpy()
    columns = torch.empty(similarity.shape[:-1], dtype=torch.int64)
    for b, n in product(*map(range, similarity.shape[:2])):
        columns[b, n] = torch.from_numpy(linear_sum_assignment(costs[b, n])[1])
    return columns.to(similarity.device)


def instance_loss(
    projected: Tensor,  # [B, T, N, P, D] of length 1
    teacher_projected: Tensor,  # [B, T, N, P, D] of length 1
    valid: Tensor,  # [B, T, N, P] bool
    teacher_valid: Tensor,  # [B, T, N, P] bool
    margin: float = 0.5,
    same_frame: bool = False,
) -> Tensor:
    """Pull each instance of a frame to its match in another frame, and push it from the other instances there."""
    frames, others = range(projected.shape[1]), max(projected.shape[3] - 1, 1)
    pairs = product(frames, frames) if same_frame else permutations(frames, 2)
    total, count = projected.new_zeros(()), projected.new_zeros(())
    for i, j in pairs:
        similarity = projected[:, i] @ teacher_projected[:, j].mT  # [B, N, P, P]
        matched = match(similarity).unsqueeze(-1)
        positive = similarity.gather(-1, matched).squeeze(-1)
        negative = F.relu(similarity - margin).scatter(-1, matched, 0.0).sum(-1) / others
        counts = teacher_valid[:, j].gather(-1, matched.squeeze(-1))  # whether the match is valid
        total = total + (valid[:, i] * (negative - counts * positive)).sum()
        count = count + (valid[:, i] + COUNT_EPS).sum()
    return total / count


class PublishedSmtc(nn.Module):
    """SMTC's model and loss.

    Args:
        num_semantics: N.
        dim: width D of the slots; that of the features unless ``project_features``.
        feature_dim: width C of the features.
        grid: patch grid (h, w), M = h w.
        hidden_dim: width of the hidden layer of the slots' MLP; D if None, as published.
        iterations: of each stage.
        update: how slots take their updates, by a sum (as in the public code) or by a GRU (as in the paper).
        implicit: "bilevel", gradients of the last iteration alone, which the initial slots get too (as in the public
            code); or "none", gradients through all iterations.
        threshold: τ of a semantic's mask: 0.3 as in the public code; 0.5 in the paper.
        mask_on: what τ is compared with for the instances' tokens: "probabilities" (as in the paper) or "logits" (as in
            the public code). For validity it is probabilities.
        sampling_gradient: "none": drawn instances give no gradient to μ and σ (as in the public code);
            "reparameterised": they do.
        project_features: add a linear layer of the features (as in the paper) instead of the features to the embedding
            of correlations.
        marginals: of the transport plan: "uniform" (as in the paper) or "norm", proportional to the sum of the absolute
            values of a token of length 1 (as in the public code).
        same_frame: also match instances of the student and the teacher in the same frame (as in the public code).
        eps: of the transport plan.
        rounds: of the transport plan.
        least_share: τ1, share of the tokens that a semantic must exceed for its instances to count.
        least_similarity: τ2, cosine similarity to its semantic that an instance must exceed to count.
        margin: similarity above which an instance is pushed from those that it does not match.
    """

    def __init__(
        self,
        num_semantics: int,
        dim: int,
        feature_dim: int,
        grid: tuple[int, int],
        *,
        hidden_dim: int | None = None,
        iterations: int = 3,
        update: Update = "residual",
        implicit: Implicit = "bilevel",
        threshold: float = 0.3,
        mask_on: MaskOn = "probabilities",
        sampling_gradient: SamplingGradient = "none",
        project_features: bool = False,
        marginals: Marginals = "uniform",
        same_frame: bool = False,
        eps: float = 0.05,
        rounds: int = 3,
        least_share: float = 0.2,
        least_similarity: float = 0.5,
        margin: float = 0.5,
    ) -> None:
        super().__init__()
        if not project_features and feature_dim != dim:
            raise ValueError(f"features of width {feature_dim} are added to embeddings of width {dim}")
        self.threshold, self.least_share, self.least_similarity = threshold, least_share, least_similarity
        self.marginals, self.eps, self.rounds = marginals, eps, rounds
        self.same_frame, self.margin = same_frame, margin
        tokens, slot_attention = grid[0] * grid[1], SlotAttention(dim, hidden_dim or dim, iterations, update, implicit)
        options = (threshold, mask_on, sampling_gradient, project_features)
        self.student = Branch(num_semantics, dim, feature_dim, tokens, slot_attention, *options)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(
        self,
        student_features: Tensor,  # [B, T, M, C]
        teacher_features: Tensor,  # [B, T, M, C]
        partners: Tensor,  # [B, T] int64
        student_noise: Tensor,  # [B, T, N, P, D], standard normal
        teacher_noise: Tensor,  # [B, T, N, P, D], standard normal
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts "semantic", "overlap" and "instance", of which it is the sum."""
        student: Found = self.student(student_features, partners, student_noise)
        with torch.no_grad():
            teacher: Found = self.teacher(teacher_features, partners, teacher_noise)
        with torch.autocast(student_features.device.type, enabled=False):
            student, teacher = (
                Found(*(t.to(torch.promote_types(t.dtype, torch.float32)) for t in found))
                for found in (student, teacher)
            )
            losses = self.losses(student, teacher, teacher_features.to(student.logits.dtype))
        return torch.stack(list(losses.values())).sum(), losses

    def losses(self, student: Found, teacher: Found, teacher_features: Tensor) -> dict[str, Tensor]:
        """The three losses, of what both branches find and the teacher's features [B, T, M, C]."""
        probabilities, teacher_probabilities = student.logits.softmax(2), teacher.logits.softmax(2)
        with torch.no_grad():
            directions = F.normalize(teacher_features, dim=-1)
            plans = {
                (i, j): plan_between(directions[:, i], directions[:, j], self.marginals, self.eps, self.rounds)
                for i, j in permutations(range(directions.shape[1]), 2)
            }
        thresholds = (self.threshold, self.least_share, self.least_similarity)
        valid, teacher_valid = (valid_instances(found, *thresholds) for found in (student, teacher))
        return {
            "semantic": semantic_loss(probabilities, teacher_probabilities, plans),
            "overlap": overlap(probabilities),
            "instance": instance_loss(
                student.projected, teacher.projected, valid, teacher_valid, self.margin, self.same_frame
            ),
        }

    @classmethod
    def of(cls, model: "Smtc") -> Self:
        """The published model with the options and the weights of this project's, from features on.

        Raises:
            ValueError: if the published model has no such loss.
        """
        student, config, loss = model.student, model.config.model, model.config.loss
        weights = (loss.semantic_weight, loss.regulariser_weight, loss.instance_weight)
        if weights != (1, 1, 1) or loss.instance_distance != "cosine":
            raise ValueError("the published model has the sum of the losses, with cosine similarities of instances")
        published = cls(
            config.num_semantics,
            student.dim,
            student.correlation.feature_dim,
            student.grid,
            iterations=config.iterations,
            update=config.update,
            implicit=config.implicit,
            threshold=config.mask_threshold,
            mask_on=config.mask_on,
            sampling_gradient=config.sampling_gradient,
            project_features=config.project_features,
            marginals=loss.marginals,
            same_frame=loss.same_frame,
            eps=loss.transport_eps,
            rounds=loss.transport_iterations,
            least_share=loss.area_threshold,
            least_similarity=loss.similarity_threshold,
            margin=loss.margin,
        )
        parameters = model.state_dict()
        of_encoders = {name for name in parameters if name.split(".")[1] == "encoder"}
        published = published.to(student.mu)  # first, or float64 weights would be rounded
        published.load_state_dict({name: parameters[name] for name in parameters.keys() - of_encoders})
        return published

    @torch.no_grad()
    def update_teacher(self, momentum: float = 0.999) -> None:
        """Move the teacher's parameters towards the student's."""
        for own, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            own.copy_(momentum * own + (1 - momentum) * new)
