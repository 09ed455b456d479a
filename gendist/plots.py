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

DPI = 110
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
NUM_BINS = 50  # of a histogram
MAX_TEXT = 22  # letters of a name
CELLS_A_LINE = 50  # of a sequence of letters
CELL = 20 / DPI  # inches, its width: two places of 10 pixels, since places are of whole pixels
MONOSPACE = 0.602  # the width of a letter of DejaVu Sans Mono, as a part of its height
BEYOND_MEASURE = 1e100

Array = np.ndarray[Any, Any]


# What all have in common


def _new(width: float, height: float) -> Any:
    """A figure that finds room for what stands beside its panels: for few of them, since it is drawn several times."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _grid(
    num_rows: int, num_columns: int, size: tuple[float, float], right: float = 0.15, top: float = 0.15, **options: Any
) -> tuple[Any, Any]:
    """A figure and its (rows, columns) panels, each of this size, with fixed room between and beside them; all in inches."""
    from matplotlib.figure import Figure

    (width, height), left, bottom, between = size, 0.8, 0.6, (0.5, 0.3)
    whole = (left + num_columns * (width + between[0]) - between[0] + right, bottom + num_rows * (height + between[1]))
    whole = (whole[0], whole[1] - between[1] + top)
    figure = Figure(figsize=whole)
    places = {"left": left / whole[0], "right": 1.0 - right / whole[0], "bottom": bottom / whole[1]}
    places |= {"top": 1.0 - top / whole[1], "wspace": between[0] / width, "hspace": between[1] / height}
    return figure, figure.subplots(num_rows, num_columns, squeeze=False, gridspec_kw=places, **options)


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


def _tidy(panel: Any, x_ticks: int = 4, y_ticks: int = 4) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
    panel.locator_params(axis="x", nbins=x_ticks)
    panel.locator_params(axis="y", nbins=y_ticks)
    panel.ticklabel_format(scilimits=(-3, 4))


def _legend(
    figure: Any, colours: Any, names: Sequence[str], shares: Sequence[float] | None = None, loc: str = "upper right"
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
        panel.hist(values, bins=NUM_BINS, range=_resolved(float(values.min()), float(values.max())), **options)


def _resolved(low: float, high: float) -> tuple[float, float]:
    """The range, made so wide that float64 can tell the ends of its bins apart."""
    least = max(NUM_BINS * np.spacing(max(abs(low), abs(high))), 0.0 if high > low else 0.5)
    margin = max(least - (high - low) / 2, 0.0)
    return low - margin, high + margin


def _named_ticks(set_ticks: Any, names: Sequence[str], most: int, **options: Any) -> None:
    if len(names) <= most:
        set_ticks(range(len(names)), [legible(name) for name in names], fontsize=8, **options)


# Samples


def panels(x_ND: Array, names: Sequence[str], texts: Sequence[Sequence[str]]) -> bytes:
    """Every pair of the first features as points, and each of them as a histogram on the diagonal. texts: as of `lines`."""
    x_ND = _measurable(x_ND)
    size = min(len(names), MAX_PANELS)
    figure, axes = _grid(size, size, (2.1, 2.1))
    for i in range(size):
        for j in range(size):
            panel = axes[i, j]
            _tidy(panel)
            if i == j:
                _hist(panel, x_ND[:, i])
            else:
                panel.plot(x_ND[:, j], x_ND[:, i], ".", markersize=2, alpha=0.5)
                if texts[i]:
                    _named_ticks(panel.set_yticks, texts[i], MAX_TICKS, rotation=90, va="center")
            if texts[j]:
                _named_ticks(panel.set_xticks, texts[j], MAX_TICKS)
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
    if are_letters(texts):
        return _letters([np.asarray(x_TD)[:, 0] for x_TD in sequences], None, (), texts[0], titles)
    shown = min(len(names), MAX_PANELS)
    figure, axes = _grid(shown, 1, (8.0, 1.5), right=1.8 if titles else 0.15, sharex=True)
    axes = axes[:, 0]
    for d, panel in enumerate(axes):
        _tidy(panel, x_ticks=10)
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
        drawn, ((panel,),) = _grid(1, 1, (5.6, 5.0), right=1.9)
        _tidy(panel, x_ticks=8, y_ticks=8)
        if size == 1:
            _densities(panel, figure, features[0], colours)
        else:
            _plane(panel, figure, features[0], features[1], x_ND, colours[group_N], colours[groups])
        panel.set_xlabel(legible(names[features[0]]))
        panel.set_ylabel("density" if size == 1 else legible(names[features[1]]))
    else:
        drawn, axes = _grid(size, size, (2.1, 2.1), sharex="col")
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
    _legend(drawn, colours, figure.names, shares)
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
    if are_letters(texts):
        states = figure.states_ST.tolist()
        return _letters(list(figure.x_STD[:, :, 0].numpy()), states, figure.names, texts[0], figure.titles)
    return _bands(figure, names, texts)


def are_letters(texts: Sequence[Sequence[str]]) -> bool:
    """Whether a step is a single letter."""
    return len(texts) == 1 and len(texts[0]) > 0 and max(map(len, texts[0])) == 1


def _bands(figure: Strips, names: Sequence[str], texts: Sequence[Sequence[str]]) -> bytes:
    from matplotlib.colors import ListedColormap

    sequences = figure.x_STD[:MAX_LINES, :MAX_STEPS].numpy()
    states_ST = figure.states_ST[:MAX_LINES, :MAX_STEPS].numpy()
    shown = min(len(names), MAX_PANELS)
    colours = colours_of(len(figure.names))
    top = 0.35 if figure.titles else 0.15
    drawn, axes = _grid(len(sequences), 1, (8.4, 1.3), right=1.8, top=top, sharex=True)
    axes = axes[:, 0]
    for s, (panel, x_TD, states_T) in enumerate(zip(axes, sequences, states_ST, strict=True)):
        _tidy(panel, x_ticks=10)
        x_TD = _measurable(x_TD)[:, :shown]
        for d in range(shown):
            style: dict[str, Any] = {"color": str(0.15 + 0.5 * d / shown), "linestyle": ("-", "--", "-.", ":")[d]}
            step = "steps-mid" if texts[d] else "default"
            panel.plot(x_TD[:, d], linewidth=1.2, drawstyle=step, marker="." if len(x_TD) < 40 else None, **style)
        low, high = (np.nanmin(x_TD), np.nanmax(x_TD)) if not np.isnan(x_TD).all() else (0.0, 1.0)
        margin = 0.08 * (high - low) or 0.5
        extent = (-0.5, len(states_T) - 0.5, *_resolved(float(low - margin), float(high + margin)))
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
        drawn.legend(lines_of_features, [legible(name) for name in names[:shown]], loc="lower right", frameon=False, fontsize=9)
    axes[-1].set_xlabel("step")
    _legend(drawn, colours, figure.names)
    return _png(drawn)


def _letters(
    sequences: Sequence[Array],
    states: Sequence[Sequence[int]] | None,
    names: Sequence[str],
    texts: Sequence[str],
    titles: Sequence[str],
) -> bytes:
    """Each letter, CELLS_A_LINE a line, in a cell of its state's colour where there are states, which have names."""
    from matplotlib.collections import PolyCollection

    colours = colours_of(len(names))
    cells, cell_colours, written, y = [], [], [], 0.0
    for s, x_T in enumerate(sequences[:MAX_LINES]):
        if titles:
            written.append((y, legible(titles[s])))
            y += 1.0
        # Two places of a fixed width a letter: so a line is one text, and is drawn at once.
        letters = [legible(texts[int(x)] if 0 <= x < len(texts) else "?", 1) for x in x_T[:MAX_STEPS].tolist()]
        for first in range(0, len(letters), CELLS_A_LINE):
            line = slice(first, min(first + CELLS_A_LINE, len(letters)))
            written.append((y, " ".join(letters[line])))
            for left, state in enumerate(states[s][line] if states is not None else ()):
                cells.append([(left, y), (left + 1, y), (left + 1, y + 0.92), (left, y + 0.92)])
                cell_colours.append(colours[state])
            y += 1.0
        y += 0.6
    drawn, ((panel,),) = _grid(1, 1, (CELLS_A_LINE * CELL, 1.25 * CELL * max(y - 0.6, 1.0)), right=1.8 if names else 0.8)
    panel.add_collection(PolyCollection(cells, facecolors=cell_colours, alpha=0.45, linewidths=0))
    for top, text in written:
        size = 72.0 * CELL / (2.0 * MONOSPACE)
        panel.text(0.25, top + 0.47, text, ha="left", va="center_baseline", fontsize=size, family="DejaVu Sans Mono")
    panel.set_xlim(0, CELLS_A_LINE)
    panel.set_ylim(max(y - 0.6, 1.0), 0)
    panel.set_axis_off()
    if names:
        _legend(drawn, colours, names)
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
        panel.set_xticks([])
        panel.set_yticks([])
        if m % num_columns == 0:
            _named_ticks(panel.set_yticks, figure.row_names, room)
        if m // num_columns == num_rows - 1:
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
