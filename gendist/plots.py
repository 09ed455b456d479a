"""Figures that are no images, by matplotlib: points, outlines, lines, bands and matrices, each as the bytes of a PNG file.

Whatever a user calls a feature, and whatever numbers a model makes, comes out as a picture: names are shortened and stripped of
what the font has no sign for, and entries that are missing, infinite or beyond all measure are left out.
Legend: N rows, D features, K latents, S sequences, T steps.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from gendist.figures import Matrices, Mixture, Profiles, Strips

MAX_PANELS = 4  # features, on a side
MAX_LINES = 5  # sequences, over time
MAX_TICKS = 12  # texts at an axis that has room for few
MAX_NAMES = 40  # at an axis that has room for many
MAX_OUTLINES = 40  # components, the heaviest
MAX_LEGEND = 12
MAX_PROFILES = 12  # features, a panel each
MAX_FEATURES = 60  # of a matrix of classes by features
MAX_MATRICES = 10
MAX_STEPS = 300  # of a sequence
MAX_TEXT = 22  # letters of a name
CELLS_A_LINE = 50  # of a sequence of letters
BEYOND_MEASURE = 1e100
DPI = 110

Array = np.ndarray[Any, Any]


# What all have in common


def _new(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> bytes:
    written = io.BytesIO()
    figure.savefig(written, dpi=DPI, format="png")
    return written.getvalue()


@cache
def _signs() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def legible(text: Any, max_text: int = MAX_TEXT) -> str:
    """The text without signs that the font lacks or that would be read as a formula, and not longer than there is room for."""
    signs = "".join("␣" if sign == " " else sign for sign in str(text)) if str(text).isspace() else str(text)
    signs = "".join(sign if ord(sign) in _signs() and sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in signs)
    signs = signs if len(signs) <= max_text else signs[: max_text - 1] + "…"
    return signs.replace("$", r"\$")


def colours_of(number: int) -> Any:
    """(number, 4) red, green, blue and opacity, as different as they come."""
    from matplotlib import colormaps

    return colormaps["tab10"](np.arange(number)) if number <= 10 else colormaps["turbo"](np.linspace(0.05, 0.95, number))


def _measurable(values: Any) -> Array:
    """As float64, with NaN for what cannot be drawn."""
    array = np.asarray(values, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(array) < BEYOND_MEASURE, array, np.nan)


def _tidy(panel: Any) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)


def _legend(
    figure: Any, colours: Any, names: Sequence[str], shares: Sequence[float] | None = None, loc: str = "outside right upper"
) -> None:
    from matplotlib.lines import Line2D

    order = range(len(names)) if shares is None or len(names) <= MAX_LEGEND else np.argsort(-np.asarray(shares), kind="stable")
    shown = [int(g) for g in order][:MAX_LEGEND]
    handles = [Line2D([], [], color=colours[g], marker="o", linestyle="", markersize=6) for g in shown]
    texts = [legible(names[g]) + ("" if shares is None else f"  {shares[g]:.2f}") for g in shown]
    if len(names) > len(shown):
        handles.append(Line2D([], [], linestyle=""))
        texts.append(f"and {len(names) - len(shown)} more")
    figure.legend(handles, texts, loc=loc, frameon=False, fontsize=9)


def _hist(panel: Any, values: Any, **options: Any) -> None:
    values = _measurable(values)
    values = values[~np.isnan(values)]
    if len(values):
        panel.hist(values, bins=50, **options)


def _named_ticks(set_ticks: Any, names: Sequence[str], most: int, **options: Any) -> None:
    if len(names) <= most:
        set_ticks(range(len(names)), [legible(name) for name in names], fontsize=8, **options)


# Samples


def panels(x_ND: Array, names: Sequence[str]) -> bytes:
    """Every pair of the first features as points, and each of them as a histogram on the diagonal."""
    x_ND = _measurable(x_ND)
    size = min(len(names), MAX_PANELS)
    figure = _new(2.6 * size + 0.6, 2.6 * size + 0.6)
    axes = figure.subplots(size, size, squeeze=False)
    for i in range(size):
        for j in range(size):
            panel = axes[i, j]
            _tidy(panel)
            if i == j:
                _hist(panel, x_ND[:, i])
            else:
                panel.plot(x_ND[:, j], x_ND[:, i], ".", markersize=2, alpha=0.5)
            if i == size - 1:
                panel.set_xlabel(legible(names[j]))
            if j == 0:
                panel.set_ylabel(legible(names[i]))
    return _png(figure)


def lines(
    sequences: Sequence[Array], names: Sequence[str], texts: Sequence[Sequence[str]], titles: Sequence[str] = ()
) -> bytes:
    """Each of the first features over time, a line a sequence; the texts that a feature is an index of stand at its axis.

    sequences  (T, D) each
    texts      of each feature, empty of one that is a number
    """
    shown = min(len(names), MAX_PANELS)
    figure = _new(9.0, 1.8 * shown + 0.6)
    axes = figure.subplots(shown, 1, squeeze=False, sharex=True)[:, 0]
    for d, panel in enumerate(axes):
        _tidy(panel)
        for x_TD in sequences[:MAX_LINES]:
            x_T = _measurable(x_TD)[:MAX_STEPS, d]
            marker = "." if len(x_T) <= 2 else None
            panel.plot(x_T, linewidth=1.2, alpha=0.85, marker=marker, drawstyle="steps-mid" if texts[d] else "default")
        panel.set_ylabel(legible(names[d]))
        if texts[d]:
            _named_ticks(panel.set_yticks, texts[d], MAX_TICKS)
    if titles:
        _legend(figure, colours_of(10), titles[:MAX_LINES])
    axes[-1].set_xlabel("step")
    return _png(figure)


# Figures of families


def mixture(figure: Mixture, names: Sequence[str]) -> bytes:
    """Points and outlines in each plane of the features that tell the components apart best; of one feature its density."""
    features = _telling(figure.means_KD.numpy(), _variances(figure), figure.weights_K.numpy(), MAX_PANELS)
    groups = figure.group_K.tolist()
    colours = colours_of(len(figure.names))
    shares = [float(figure.weights_K[figure.group_K == g].sum()) for g in range(len(figure.names))]
    x_ND, group_N = _measurable(figure.x_ND), figure.group_K[figure.latent_N].numpy()
    size = len(features)
    if size <= 2:
        drawn = _new(7.6, 5.6)
        panel = drawn.subplots()
        _tidy(panel)
        if size == 1:
            _densities(panel, figure, features[0], colours)
        else:
            _plane(panel, figure, features[0], features[1], x_ND, colours[group_N], colours[groups])
        panel.set_xlabel(legible(names[features[0]]))
        panel.set_ylabel("density" if size == 1 else legible(names[features[1]]))
    else:
        drawn = _new(2.6 * size + 0.4, 2.6 * size)
        axes = drawn.subplots(size, size, squeeze=False, sharex="col")
        for i in range(size):
            for j in range(size):
                panel = axes[i, j]
                if j > i:
                    panel.set_axis_off()
                    continue
                _tidy(panel)
                if i == j:
                    _densities(panel, figure, features[i], colours)
                    panel.set_yticks([])
                else:
                    _plane(panel, figure, features[j], features[i], x_ND, colours[group_N], colours[groups])
                if i == size - 1:
                    panel.set_xlabel(legible(names[features[j]]))
                if j == 0 and i > 0:
                    panel.set_ylabel(legible(names[features[i]]))
    _legend(drawn, colours, figure.names, shares, "outside right upper" if size <= 2 else "upper right")
    return _png(drawn)


def _variances(figure: Mixture) -> Array | None:
    """(K, D)"""
    if figure.covariances is None:
        return None
    covariances = figure.covariances
    return (covariances if covariances.ndim == 2 else covariances.diagonal(dim1=1, dim2=2)).numpy()


def _plane(panel: Any, figure: Mixture, i: int, j: int, x_ND: Array, point_colours: Any, outline_colours: Any) -> None:
    panel.scatter(x_ND[:, i], x_ND[:, j], s=3, c=point_colours, alpha=0.35, linewidths=0)
    heaviest = figure.weights_K.argsort(descending=True, stable=True)[:MAX_OUTLINES].tolist()
    for k in heaviest if figure.covariances is not None else ():
        panel.plot(*_measurable(figure.outline(k, i, j)).T, color=outline_colours[k], linewidth=1.5)
    means_kD = _measurable(figure.means_KD)[heaviest]
    style: dict[str, Any] = {"edgecolors": "white", "linewidths": 0.8, "zorder": 3}
    panel.scatter(means_kD[:, i], means_kD[:, j], s=26, c=outline_colours[heaviest], **style)


def _densities(panel: Any, figure: Mixture, i: int, colours: Any) -> None:
    """The histogram of a feature, and the density of each group, weighed by its share."""
    _hist(panel, figure.x_ND[:, i], density=True, color="0.85")
    variances_KD = _variances(figure)
    if variances_KD is None:
        return
    values = _measurable(figure.x_ND[:, i])
    if np.isnan(values).all():
        return
    grid = np.linspace(np.nanmin(values), np.nanmax(values), 400)
    mean_K1, weights_K1 = figure.means_KD[:, i, None].numpy(), figure.weights_K[:, None].numpy()
    variance_K1 = np.maximum(variances_KD[:, i, None], 1e-300)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        density_KP = weights_K1 * np.exp(-0.5 * (grid - mean_K1) ** 2 / variance_K1) / np.sqrt(2.0 * np.pi * variance_K1)
    for g in range(len(figure.names)):
        panel.plot(grid, _measurable(density_KP[figure.group_K.numpy() == g].sum(0)), color=colours[g], linewidth=1.5)


def _telling(means_KD: Array, variances_KD: Array | None, weights_K: Array | None, most: int) -> list[int]:
    """The features, in their order, of whose variance most is between the latents; all where there are few."""
    means_KD = np.nan_to_num(_measurable(means_KD))
    if means_KD.shape[1] <= most:
        return list(range(means_KD.shape[1]))
    center_D = np.average(means_KD, axis=0, weights=weights_K)
    between_D = np.average((means_KD - center_D) ** 2, axis=0, weights=weights_K)
    within_D = np.zeros_like(between_D)
    if variances_KD is not None:
        within_D = np.average(np.nan_to_num(_measurable(variances_KD)), axis=0, weights=weights_K)
    share_D = between_D / np.maximum(between_D + within_D, 1e-300) if variances_KD is not None else between_D
    return sorted(np.argsort(-share_D, kind="stable")[:most].tolist())


def strips(figure: Strips, names: Sequence[str], texts: Sequence[Sequence[str]]) -> bytes:
    """A panel a sequence: its first features over bands of the colours of its states; of texts the texts themselves."""
    is_text = len(names) == 1 and texts[0] and max(map(len, texts[0])) <= 2
    return _letters(figure, texts[0]) if is_text else _bands(figure, names, texts)


def _bands(figure: Strips, names: Sequence[str], texts: Sequence[Sequence[str]]) -> bytes:
    from matplotlib.colors import ListedColormap

    sequences = figure.x_STD[:MAX_LINES, :MAX_STEPS].numpy()
    states_ST = figure.states_ST[:MAX_LINES, :MAX_STEPS].numpy()
    shown = min(len(names), MAX_PANELS)
    colours = colours_of(len(figure.names))
    drawn = _new(10.5, 1.7 * len(sequences) + 0.5)
    axes = drawn.subplots(len(sequences), 1, squeeze=False, sharex=True)[:, 0]
    for s, (panel, x_TD, states_T) in enumerate(zip(axes, sequences, states_ST, strict=True)):
        _tidy(panel)
        x_TD = _measurable(x_TD)[:, :shown]
        for d in range(shown):
            style: dict[str, Any] = {"color": str(0.15 + 0.5 * d / shown), "linestyle": ("-", "--", "-.", ":")[d]}
            step = "steps-mid" if texts[d] else "default"
            panel.plot(x_TD[:, d], linewidth=1.2, drawstyle=step, marker="." if len(x_TD) < 40 else None, **style)
        low, high = (np.nanmin(x_TD), np.nanmax(x_TD)) if not np.isnan(x_TD).all() else (0.0, 1.0)
        margin = 0.08 * (high - low) or 0.5
        extent = (-0.5, len(states_T) - 0.5, low - margin, high + margin)
        panel.imshow(
            states_T[None], extent=extent, aspect="auto", alpha=0.35, interpolation="nearest",
            cmap=ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5,
        )  # fmt: skip
        panel.set_ylim(extent[2:])
        if shown == 1 and texts[0]:
            _named_ticks(panel.set_yticks, texts[0], MAX_TICKS)
        if figure.titles:
            panel.set_title(legible(figure.titles[s]), fontsize=9, loc="left")
        elif shown == 1:
            panel.set_ylabel(legible(names[0]))
    if shown > 1:
        lines_of_features = axes[0].get_lines()[:shown]
        drawn.legend(
            lines_of_features, [legible(name) for name in names[:shown]], loc="outside right lower", frameon=False, fontsize=9
        )
    axes[-1].set_xlabel("step")
    _legend(drawn, colours, figure.names)
    return _png(drawn)


def _letters(figure: Strips, texts: Sequence[str]) -> bytes:
    """Each letter in a cell of its state's colour, CELLS_A_LINE a line."""
    from matplotlib.collections import PolyCollection

    colours = colours_of(len(figure.names))
    sequences, states = figure.x_STD[:MAX_LINES, :MAX_STEPS, 0].tolist(), figure.states_ST[:MAX_LINES, :MAX_STEPS].tolist()
    cells, cell_colours, y = [], [], 0.0
    drawn = _new(11.5, 0.0)
    panel = drawn.subplots()
    for s, (x_T, states_T) in enumerate(zip(sequences, states, strict=True)):
        if figure.titles:
            panel.text(0.0, y + 0.75, legible(figure.titles[s]), fontsize=9, weight="bold")
            y += 1.0
        for t, (value, state) in enumerate(zip(x_T, states_T, strict=True)):
            left, top = t % CELLS_A_LINE, y + t // CELLS_A_LINE
            cells.append([(left, top), (left + 1, top), (left + 1, top + 0.92), (left, top + 0.92)])
            cell_colours.append(colours[state])
            text = texts[int(value)] if int(value) < len(texts) else "?"
            panel.text(left + 0.5, top + 0.47, legible(text, 2), ha="center", va="center", fontsize=9, family="DejaVu Sans")
        y += -(-len(x_T) // CELLS_A_LINE) + 0.6
    panel.add_collection(PolyCollection(cells, facecolors=cell_colours, alpha=0.45, linewidths=0))
    panel.set_xlim(0, CELLS_A_LINE)
    panel.set_ylim(y - 0.6, 0)
    panel.set_axis_off()
    drawn.set_size_inches(11.5, 0.24 * y + 0.4)
    _legend(drawn, colours, figure.names)
    return _png(drawn)


def matrices(figure: Matrices) -> bytes:
    values_MRC = _measurable(figure.values_MRC)[:MAX_MATRICES]
    num_columns = min(len(values_MRC), 5 if len(values_MRC) > 4 else len(values_MRC))
    num_rows = -(-len(values_MRC) // num_columns)
    side = 6.0 if len(values_MRC) == 1 else 2.6
    drawn = _new(side * num_columns + 1.0, (side - 0.4) * num_rows)
    axes = drawn.subplots(num_rows, num_columns, squeeze=False).flatten()
    highest = float(np.nanmax(values_MRC)) if not np.isnan(values_MRC).all() else 1.0
    image = None
    for m, panel in enumerate(axes):
        if m >= len(values_MRC):
            panel.set_axis_off()
            continue
        image = panel.imshow(values_MRC[m], cmap="Blues", vmin=0.0, vmax=highest or 1.0, aspect="auto")
        room = MAX_NAMES if len(values_MRC) == 1 else MAX_TICKS
        _named_ticks(panel.set_yticks, figure.row_names, room)
        _named_ticks(panel.set_xticks, figure.column_names, room, rotation=90 if len(figure.column_names) > 6 else 0)
        if len(values_MRC) == 1 and max(values_MRC.shape[1:]) <= MAX_TICKS:
            for (r, c), value in np.ndenumerate(values_MRC[m]):
                colour = "white" if value > 0.6 * highest else "black"
                panel.text(c, r, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
        if figure.titles:
            panel.set_title(legible(figure.titles[m]), fontsize=9)
        elif len(values_MRC) == 1:
            panel.set_ylabel("from")
            panel.set_xlabel("to")
    drawn.colorbar(image, ax=axes.tolist(), shrink=0.7)
    return _png(drawn)


def profiles(figure: Profiles, names: Sequence[str], texts: Sequence[Sequence[str]]) -> bytes:
    """A panel a feature, where they are few: of a number the mean of each latent and two standard deviations about it, of a
    category how probable each is. Of many features a matrix: how far each latent's mean is from the mean of all."""
    means_KD, variances_KD = figure.means_KD.numpy(), None if figure.variances_KD is None else figure.variances_KD.numpy()
    if means_KD.shape[1] > MAX_PROFILES and not figure.probs:
        return _deviations(figure, means_KD, variances_KD, names)
    features = _telling(means_KD, variances_KD, None, MAX_PROFILES)
    num_columns = min(len(features), 3)
    num_rows = -(-len(features) // num_columns)
    widest = max((figure.probs[d].shape[1] for d in features if d in figure.probs), default=0)
    width = 3.4 if widest <= MAX_TICKS else 11.0 / num_columns
    height = max(1.9, 0.28 * len(figure.names) + 0.9)
    drawn = _new(width * num_columns + 1.2, height * num_rows)
    axes = drawn.subplots(num_rows, num_columns, squeeze=False).flatten()
    colours = colours_of(len(figure.names))
    for panel in axes[len(features) :]:
        panel.set_axis_off()
    for index, (panel, d) in enumerate(zip(axes, features, strict=False)):
        panel.set_title(legible(names[d]), fontsize=9)
        if d in figure.probs:
            probs_KC = figure.probs[d].numpy()
            panel.imshow(probs_KC, cmap="Blues", vmin=0.0, vmax=max(float(probs_KC.max()), 1e-12), aspect="auto")
            shown = list(texts[d])[: probs_KC.shape[1]] or [str(c) for c in range(probs_KC.shape[1])]
            rotation = 90 if max(map(len, shown)) * len(shown) > 30 else 0
            _named_ticks(panel.set_xticks, shown, 80 if width > 3.4 else MAX_TICKS, rotation=rotation)
        else:
            _tidy(panel)
            mean_K = _measurable(means_KD[:, d])
            spread_K = np.zeros_like(mean_K) if variances_KD is None else 2.0 * np.sqrt(_measurable(variances_KD[:, d]))
            for k in range(len(mean_K)):
                panel.plot([mean_K[k] - spread_K[k], mean_K[k] + spread_K[k]], [k, k], color=colours[k], linewidth=3, alpha=0.5)
                panel.plot(mean_K[k], k, "o", color=colours[k])
            panel.set_ylim(len(mean_K) - 0.5, -0.5)
        panel.set_yticks([])
        if index % num_columns == 0:
            _named_ticks(panel.set_yticks, figure.names, MAX_NAMES)
    return _png(drawn)


def _deviations(figure: Profiles, means_KD: Array, variances_KD: Array | None, names: Sequence[str]) -> bytes:
    from matplotlib.colors import TwoSlopeNorm

    features = _telling(means_KD, variances_KD, None, MAX_FEATURES)
    means_KF = np.nan_to_num(_measurable(means_KD[:, features]))
    away_KF = means_KF - means_KF.mean(0)
    variance_F = away_KF.var(0)
    if variances_KD is not None:
        variance_F = variance_F + np.nan_to_num(_measurable(variances_KD[:, features])).mean(0)
    away_KF = away_KF / np.sqrt(np.maximum(variance_F, 1e-300))
    drawn = _new(0.2 * len(features) + 2.4, max(2.4, 0.26 * len(means_KF) + 1.8))
    panel = drawn.subplots()
    most = max(float(np.abs(away_KF).max()), 1e-12)
    image = panel.imshow(away_KF, cmap="RdBu_r", norm=TwoSlopeNorm(0.0, -most, most), aspect="auto")
    _named_ticks(panel.set_yticks, figure.names, MAX_NAMES)
    _named_ticks(panel.set_xticks, [names[d] for d in features], MAX_FEATURES, rotation=90)
    drawn.colorbar(image, ax=panel, shrink=0.8, label="standard deviations\nfrom the mean of all")
    return _png(drawn)
