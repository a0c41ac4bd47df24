"""What a number means, for readers who did not choose it."""

METRIC_DESCRIPTIONS = {
    "psnr": "peak signal-to-noise ratio in dB, mean over images; higher is better",
    "psnr_masked": "PSNR of what is drawn, without the empty background; higher is better",
    "psnr_pooled": "PSNR of all images taken together; higher is better",
    "ssim": "structural similarity, at most 1; higher is better",
    "perceptual": "perceptual distance (EfficientNet-Lite, LPIPS form, uncalibrated); lower is better",
    "lpips": "LPIPS v0.1 on VGG16; lower is better",
    "lpips_alex": "LPIPS v0.1 on AlexNet; lower is better",
    "lpips_squeeze": "LPIPS v0.1 on SqueezeNet; lower is better",
    "usage": "share of the codebook that held-out images use",
    "perplexity": "codes that, used evenly, would carry as much",
    "dead_codes": "codes that no held-out image uses",
    "nats_per_token": "stage 2, negative log-likelihood of held-out codes; lower is better",
    "uniform_nats": "the same of codes drawn blindly, ln of the vocabulary",
    "class_accuracy": "share of samples that a small classifier takes for the class they were asked for",
    "class_accuracy_real": "the same of held-out images",
    "class_accuracy_decoded": "the same of held-out images that went through the codes: what samples could reach",
    "class_accuracy_chance": "the same of a classifier that guesses",
}

# Of metrics that compare two sets of images by the features of a network.
SET_METRIC_DESCRIPTIONS = {
    "fid": "Frechet Inception distance to real images; lower is better",
    "kid": "kernel Inception distance to real images; lower is better",
    "is": "Inception score; higher is better",
    "fd": "Frechet distance to real images, on other features than FID's; lower is better",
    "kd": "kernel distance to real images, on other features than KID's; lower is better",
    "score": "how sure another network than Inception is of what it sees, and how varied that is; higher is better",
    "precision": "share of the images that look real; higher is better",
    "recall": "share of real images that look like some of the images; higher is better",
    "density": "how densely real images lie around the images; higher is better",
    "coverage": "share of real images with one of the images near; higher is better",
}


def describe_metric(key: str) -> str:
    """Say what a number means; empty where nobody has said so here."""
    if key in METRIC_DESCRIPTIONS:
        return METRIC_DESCRIPTIONS[key]
    name = key.partition("_")[0]
    if name in SET_METRIC_DESCRIPTIONS:
        return SET_METRIC_DESCRIPTIONS[name]
    return (
        f"reconstructions: {SET_METRIC_DESCRIPTIONS[name[1:]]}"
        if name.startswith("r") and name[1:] in SET_METRIC_DESCRIPTIONS
        else ""
    )


PERCENT_METRICS = {
    "usage",
    *(f"class_accuracy{each}" for each in ("", "_real", "_decoded", "_chance")),
}  # written in per cent

# What is said first: how the number is written, and what it counts.
HIGHLIGHTS: dict[str, tuple[str, str]] = {
    "psnr": ("{:.1f}\u00a0dB", "PSNR of held-out images"),
    "ssim": ("{:.3f}", "SSIM of held-out images"),
    "rfid": ("{:.2f}", "rFID"),
    "fid": ("{:.2f}", "FID"),
    "perplexity": ("{:,.0f}", "perplexity of their codes"),
    "nats_per_token": ("{:.2f}", "nats per held-out code"),
    "class_accuracy": ("", "of samples look like their class"),  # as in the table
}
