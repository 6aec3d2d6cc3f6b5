"""The table of both READMEs, from the records of the studies: no figure in it is written by hand.

Usage (from the repository root): python tools/front_table.py [en|zh]
`tools/readme.py` calls it; a new record changes the READMEs with the next `make readme`.
"""

import json
import sys
from pathlib import Path

from loftr_curriculum.model.weights import PACKAGED
from loftr_curriculum.studies.card import card_of, sha256_of

CARD = Path("loftr_curriculum/weights/card.json")  # `study card`, `study unmatchable`
SIFT = Path("nbs/10_baselines/sift_pseudo_real.json")  # `study pseudo-real`
SPEED = Path("nbs/11_studies/speed.json")  # `study speed`

PEERS = Path("nbs/11_studies/benchmark.json")  # `study benchmark`: there once all systems were measured

WORDS = {
    "en": {
        "peers": ("on {} pairs of the list", "within 10 px", "median error", "no answer", "seconds"),
        "stale": "The accuracy was measured with other weights or settings than those of today.",
        "stale peers": "The systems side by side were measured with other weights than those of today.",
        "head": ("", "this package", "SIFT with MAGSAC", "LoFTR of kornia"),
        "right": "{} hard generated pairs: within 10 px",
        "median": "their median error",
        "wrong": "called `ok` and 20 px off or more",
        "stranger": "{:,} pairs without a right answer called `ok`",
        "real": "{} real pairs (CF, FA; a development set): within 10 px",
        "real median": "their median error",
        "seconds": "seconds a pair, full motion, CPU",
        "none": "no answer in {} of {}",
        "of": "{} of {}",
        "no verdict": "has no verdict",
        "open": "not measured",
        "foot": (
            "Errors in px of images of 512 px, mean of corners or landmarks; brackets: 95 % bootstrap "
            "intervals over eyes. Generated pairs: frozen list, version {}, seeds of its own. "
            "Time: {} threads of {}, torch {}; accuracy: {}. "
            "Pairs without a right answer: other eyes, fellow eyes, mirrored, no eye."
        ),
    },
    "zh": {
        "peers": ("列表中的 {} 对图像", "小于 10 px", "误差中位数", "没有答案", "秒"),
        "stale": "精度是用与当前不同的权重或设置测得的。",
        "stale peers": "各系统的并列比较是用与当前不同的权重测得的。",
        "head": ("", "本软件包", "SIFT + MAGSAC", "kornia 的 LoFTR"),
        "right": "{} 对困难的生成图像：误差小于 10 px",
        "median": "其误差中位数",
        "wrong": "判为 `ok` 但误差达到 20 px 以上",
        "stranger": "{:,} 对没有正确答案的图像，被判为 `ok`",
        "real": "{} 对真实图像（CF、FA；开发集）：误差小于 10 px",
        "real median": "其误差中位数",
        "seconds": "每对耗时（秒），任意运动，CPU",
        "none": "{1} 对中有 {0} 对没有答案",
        "of": "{1} 中的 {0}",
        "no verdict": "不给出判定",
        "open": "未测",
        "foot": (
            "误差以 512 px 图像的像素计，取角点或标志点的平均；方括号为按眼睛自举得到的 95 % 区间。"
            "生成图像：固定列表，第 {} 版，使用单独的随机种子。耗时：{} 线程，{}，torch {}；"
            "精度：{}。没有正确答案的图像：他人的眼、对侧眼、镜像、非眼底图像。"
        ),
    },
}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def percent(values: list[float]) -> str:
    """A share with its interval."""
    middle, low, high = (round(100 * value) for value in values)
    return f"{middle} % [{low}, {high}]"


def called_ok(verdicts: dict) -> int:
    """Answers that were called ok, of a table verdict -> error -> count."""
    return sum(verdicts["ok"].values())


def rows(words: dict) -> list[tuple[str, ...]]:
    """The cells of the table."""
    card, sift, speed = read(CARD), read(SIFT)["all"], read(SPEED)["registration"]["full"]
    ours, real = card["scores"]["all"], card["real"]
    hopeless = card.get("unmatchable", {})
    strangers = sum(sum(found.values()) for found in hopeless.values())
    accepted = sum(found.get("ok", 0) for found in hopeless.values())
    wrong = card["verdicts"]["ok"]["over 20 px"] + card["verdicts"]["ok"]["no answer"]
    median = words["none"].format(sift["no_answer"], sift["pairs"])
    if sift["median"] is not None:
        median = f"{sift['median']:.1f} px"
    unknown, silent = words["open"], words["no verdict"]
    share = f"{100 * sift['SR@10']:.0f} %"
    lines = [
        (words["right"].format(ours["pairs"]), percent(ours["SR@10"]), share, unknown),
        (words["median"], f"{ours['median_px'][0]:.1f} px", median, unknown),
        (words["wrong"], words["of"].format(wrong, called_ok(card["verdicts"])), silent, silent),
        (words["stranger"].format(strangers), f"{accepted}", silent, silent),
        (words["real"].format(real["pairs"]), percent(real["SR@10"]), unknown, unknown),
        (words["real median"], f"{real['median_px'][0]:.1f} px", unknown, unknown),
        (words["seconds"], f"{speed['ours']['median_s']:.1f}", unknown, f"{speed['kornia']['median_s']:.1f}"),
    ]
    return [line for line in lines if strangers or line[0] != words["stranger"].format(strangers)]


LEAST_MINUTES = 20  # of training, below which a trained system is not held against others here


def peers(words: dict) -> list[tuple[str, ...]]:
    """The systems on the hard list, the best first; nothing where they were not measured."""
    record = read(PEERS) if PEERS.is_file() else {}
    found = dict(record.get("scores", {}).get("pseudo-real", {}))
    for name, facts in record.get("trained", {}).items():
        if facts["minutes"] < LEAST_MINUTES:
            found.pop(name, None)
    if not found:
        return []
    count = max(scores["pairs"] for scores in found.values())
    head = (words["peers"][0].format(count), *words["peers"][1:])
    lines = [head, ("---",) * 5]
    for name, scores in sorted(found.items(), key=lambda item: -item[1]["right"]):
        median = "-" if scores["median"] is None else f"{scores['median']:.1f} px"
        share = percent([scores["right"], *scores["right interval"]])
        lines.append((f"`{name}`", share, median, f"{scores['no_answer']}", f"{scores['seconds']:.1f}"))
    return lines


def in_markdown(lines: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(language: str) -> str:
    """The table in Markdown, with what has to be known to read it."""
    words, card, speed = WORDS[language], read(CARD), read(SPEED)
    lines = [words["head"], ("---",) * 4, *rows(words)]
    machine, threads = speed["machine"], speed["settings"]["threads"]
    foot = words["foot"].format(
        card["list"], threads, machine["processor"], machine["torch"], card["hardware"]
    )
    if card_of()[0] is None:
        foot += f" {words['stale']}"
    if peers(words) and read(PEERS).get("weights") != sha256_of(PACKAGED):
        foot += f" {words['stale peers']}"
    return "\n\n".join(filter(None, (in_markdown(lines), in_markdown(peers(words)), foot)))


if __name__ == "__main__":
    print(table(sys.argv[1] if len(sys.argv) > 1 else "en"))
