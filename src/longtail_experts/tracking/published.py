"""Published figures on CIFAR-100-LT, exponential profile, imbalance factor 100, ResNet-32.

Top-1 accuracy on all 10,000 test images, in percent, as the source states it: on balanced test
data that is the balanced accuracy. Every one is of networks trained on the whole pool of 10,847
images. What is said of a recipe was read in the code that the source points to.
"""

from typing import NamedTuple

APPLIES_TO = {
    "source": ("cifar100",),
    "imbalance_profile": ("exp",),
    "imbalance_factor": ("100",),
    "images_per_class": ("none", "500"),
}


class Published(NamedTuple):
    method: str
    paper: str
    source: str  # where the figure was read
    top1: float
    recipe: str
    selection: str  # which epoch, by which images; how many seeds
    by_class: tuple[float, float, float] | None = None  # many, medium, few
    ece: float | None = None  # percent, 15 bins
    url: str = ""


MENON = "Menon et al., Long-tail learning via logit adjustment, ICLR 2021"
MENON_CODE = {
    "paper": MENON,
    "source": "README of the authors' code (google-research/logit_adjustment)",
    "url": "https://github.com/google-research/google-research/tree/master/logit_adjustment",
    "recipe": "crop and flip, LR 0.1 (Nesterov), batch 128, 1,419 epochs",
    "selection": "last epoch; one example run",
}
RIDE = {
    "source": "MODEL_ZOO.md of the authors' code (frank-xwang/RIDE-LongTailRecognition)",
    "url": "https://github.com/frank-xwang/RIDE-LongTailRecognition/blob/main/MODEL_ZOO.md",
    "selection": "its trainer monitors accuracy on the test images; seeds not stated",
}
MISLAS = {
    "paper": "Zhong et al., Improving calibration for long-tailed recognition, CVPR 2021",
    "source": "README of the authors' code (dvlab-research/MiSLAS)",
    "url": "https://github.com/dvlab-research/MiSLAS",
    "selection": "its code keeps the epoch best on its evaluation set; seeds not stated",
}

PUBLISHED = (
    Published("ce", top1=39.87, **MENON_CODE),
    Published("ce, post-hoc logit adjustment", top1=44.07, **MENON_CODE),
    Published("logit adjustment loss", top1=44.06, **MENON_CODE),
    Published(
        "ce",
        "baseline of Wang et al., Long-tailed recognition by routing diverse distribution-aware "
        "experts, ICLR 2021",
        top1=39.1,
        by_class=(66.1, 37.3, 10.6),
        recipe="not stated for the baseline",
        **RIDE,
    ),
    Published(
        "RIDE, 3 experts",
        "Wang et al., Long-tailed recognition by routing diverse distribution-aware experts, "
        "ICLR 2021",
        top1=48.6,
        by_class=(67.0, 49.9, 25.7),
        recipe="crop, flip and rotation, LR 0.1, weight decay 5e-4, 200 epochs in the code's "
        "config (100 in the table's heading)",
        **RIDE,
    ),
    Published(
        "LDAM-DRW",
        "Cao et al., Learning imbalanced datasets with label-distribution-aware margin loss, "
        "NeurIPS 2019",
        "Papers with Code's entry of the paper (error 57.96)",
        42.04,
        "crop and flip, LR 0.1, weight decay 2e-4, 200 epochs",
        "the authors' code keeps the epoch best on the test images; seeds not stated",
        url="https://paperswithcode.com/paper/learning-imbalanced-datasets-with-label",
    ),
    Published(
        "ce with mixup (stage 1 of MiSLAS)",
        top1=39.5,
        ece=8.82,
        recipe="mixup (alpha 1), LR 0.1, weight decay 2e-4, 200 epochs",
        **MISLAS,
    ),
    Published(
        "MiSLAS",
        top1=47.0,
        ece=4.83,
        recipe="the same, then a second stage for the classifier",
        **MISLAS,
    ),
    Published(
        "SADE, 3 experts",
        "Zhang et al., Self-supervised aggregation of diverse experts for test-agnostic "
        "long-tailed recognition, NeurIPS 2022",
        "README of the authors' code (Vanint/SADE-AgnosticLT)",
        49.8,
        "crop, flip and rotation, LR 0.1, weight decay 5e-4, 200 epochs",
        "its trainer monitors accuracy on the test images; seeds not stated",
        url="https://github.com/Vanint/SADE-AgnosticLT",
    ),
    Published(
        "BalPoE, 3 experts (tau 0, 1, 2)",
        "Sanchez Aimar et al., Balanced product of calibrated experts for long-tailed "
        "recognition, CVPR 2023",
        "wizwand.com's listing of the paper",
        55.9,
        "AutoAugment, mixup (alpha 0.4), weight decay 5e-4, 400 epochs (README and config of "
        "emasa/BalPoE-CalibratedLT)",
        "last epoch; mean of five seeds, says that README",
        url="https://www.wizwand.com/paper/68fa6fa51e209131cea46df6",
    ),
    Published(
        "GLMC",
        "Du et al., Global and local mixture consistency cumulative learning for long-tailed "
        "visual recognitions, CVPR 2023",
        "README of the authors' code (ynu-yangpeng/GLMC)",
        55.88,
        "**of four times the width** (64, 128, 256 channels; some 7.4 M parameters, 16 times as "
        "many), mixup and CutMix with a consistency loss, weight decay 5e-3, 200 epochs; the "
        "README says that the pool was drawn with repetition, and gives 57.97 without",
        "its code keeps the epoch best on the images that it tests on; seeds not stated",
        url="https://github.com/ynu-yangpeng/GLMC",
    ),
)
