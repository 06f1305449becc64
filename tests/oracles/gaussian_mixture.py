"""A Gaussian mixture, for which the ideal denoiser is known in closed form.

With x0 ~ sum_k w_k N(m_k, C_k), z = alpha x0 + sigma eps is a mixture of N(alpha m_k, alpha^2 C_k + sigma^2 I),
and E[x0 | z] is the posterior average of the components' linear regressions. All in float64.
"""

import torch
from torch import Tensor


class GaussianMixture:
    """Mixture in D dimensions whose samples have the shape (B, D, 1, 1).

    ``label``: (B,) of component numbers, or -1 for the whole mixture: the class-conditional version.
    """

    def __init__(self, weights: list[float], means: list[list[float]], covariances: list[list[list[float]]]):
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.means = torch.tensor(means, dtype=torch.float64)
        self.covariances = torch.tensor(covariances, dtype=torch.float64)

    @property
    def mean(self) -> Tensor:
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        centred = self.means - self.mean
        spread = centred[:, :, None] * centred[:, None, :]
        return (self.weights[:, None, None] * (self.covariances + spread)).sum(dim=0)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return samples (count, D, 1, 1) float64 and their components (count,)."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        normal = torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=generator)
        factor = torch.linalg.cholesky(self.covariances)[component]
        x0 = self.means[component] + (factor @ normal[:, :, None])[:, :, 0]
        return x0[:, :, None, None], component

    def responsibilities(self, z: Tensor, alpha: float, sigma: float, label: Tensor | None = None) -> Tensor:
        """Return the posterior probabilities of the components, (B, K)."""
        difference, precision = self._marginals(z, alpha, sigma)
        distance = torch.einsum("bkd,kde,bke->bk", difference, precision, difference)
        logits = self.weights.log() + 0.5 * (precision.logdet() - distance)
        if label is not None:
            other = torch.arange(len(self.weights)) != label[:, None]
            logits = logits.masked_fill(other & (label[:, None] >= 0), -torch.inf)
        return logits.softmax(dim=1)

    def expected_x0(self, z: Tensor, alpha: float, sigma: float, label: Tensor | None = None) -> Tensor:
        """Return E[x0 | z], float64, shaped like ``z`` (B, D, 1, 1)."""
        difference, precision = self._marginals(z, alpha, sigma)
        gain = alpha * self.covariances @ precision
        regressions = self.means + torch.einsum("kde,bke->bkd", gain, difference)
        posterior = self.responsibilities(z, alpha, sigma, label)
        return torch.einsum("bk,bkd->bd", posterior, regressions).view(z.shape)

    def _marginals(self, z: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """Return z - alpha m_k (B, K, D) and the inverse covariances of z in each component (K, D, D)."""
        difference = z.double().flatten(1)[:, None] - alpha * self.means
        identity = torch.eye(self.means.shape[1], dtype=torch.float64)
        return difference, torch.linalg.inv(alpha**2 * self.covariances + sigma**2 * identity)

    def prediction(self, kind: str, z: Tensor, alpha: float, sigma: float, label: Tensor | None = None) -> Tensor:
        """Return what the ideal network of this kind predicts, written out case by case."""
        x0 = self.expected_x0(z, alpha, sigma, label)
        eps = (z.double() - alpha * x0) / sigma
        return {
            "epsilon": eps,
            "v": alpha * eps - sigma * x0,
            "sample": x0,
            "flow": eps - x0,
        }[kind].to(z.dtype)


def three_blobs() -> GaussianMixture:
    """Three unequal components in 2-D within about [-1, 1], one of them correlated."""
    return GaussianMixture(
        [0.5, 0.3, 0.2],
        [[-0.6, -0.4], [0.6, -0.2], [0.1, 0.7]],
        [[[0.02, 0.01], [0.01, 0.03]], [[0.01, 0.0], [0.0, 0.04]], [[0.03, -0.01], [-0.01, 0.01]]],
    )


def ideal_denoiser(mixture, schedule, kind, label=None):
    """Return ``denoise(z, time)`` of the ideal network of this kind on ``schedule``; all rows share one time."""

    def denoise(z: Tensor, time: Tensor) -> Tensor:
        assert time.shape == (len(z),)
        alpha, sigma = schedule.at(time[0].double())
        return mixture.prediction(kind, z, alpha.item(), sigma.item(), label)

    return denoise
