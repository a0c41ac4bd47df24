"""What each metric means, in a sentence."""

METRIC_DESCRIPTIONS = {
    "psnr": "peak signal-to-noise ratio in dB, mean over images; higher is better",
    "psnr_masked": "PSNR of the foreground, without the empty background; higher is better",
    "psnr_pooled": "PSNR of the mean squared error over all images; higher is better",
    "ssim": "structural similarity, at most 1; higher is better",
    "perceptual": "perceptual distance (EfficientNet-Lite, LPIPS form, uncalibrated); lower is better",
    "lpips": "LPIPS v0.1 on VGG16; lower is better",
    "lpips_alex": "LPIPS v0.1 on AlexNet; lower is better",
    "lpips_squeeze": "LPIPS v0.1 on SqueezeNet; lower is better",
    "usage": "share of the codebook that validation images use",
    "perplexity": "exponential of the entropy of code usage, in codes",
    "dead_codes": "codes that no validation image uses",
    "nats_per_token": "stage 2, negative log-likelihood of validation codes; lower is better",
    "uniform_nats": "the same for a uniform distribution: ln of the vocabulary size",
    "class_accuracy": "share of samples that a small classifier assigns to the class they were asked for",
    "class_accuracy_real": "the same for validation images",
    "class_accuracy_decoded": "the same for reconstructions of validation images: an upper bound for samples",
    "class_accuracy_chance": "the same for guessing",
}

# Metrics that compare two sets of images by network features; keys may end in the network's name, as in fd_lite2.
SET_METRIC_DESCRIPTIONS = {
    "fid": "Frechet Inception distance to real images; lower is better",
    "kid": "kernel Inception distance to real images; lower is better",
    "is": "Inception score; higher is better",
    "fd": "Frechet distance to real images, on other features than FID's; lower is better",
    "kd": "kernel distance to real images, on other features than KID's; lower is better",
    "score": "Inception score with another network; higher is better",
    "precision": "share of generated images within the real ones; higher is better",
    "recall": "share of real images within the generated ones; higher is better",
    "density": "density of real images around generated ones; higher is better",
    "coverage": "share of real images with a generated one nearby; higher is better",
}


def describe_metric(key: str) -> str:
    """Describe a metric; "" if unknown."""
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


PERCENT_METRICS = {"usage", *(f"class_accuracy{suffix}" for suffix in ("", "_real", "_decoded", "_chance"))}

# Large figures on top of the page: format and meaning.
HIGHLIGHTS: dict[str, tuple[str, str]] = {
    "psnr": ("{:.1f}\u00a0dB", "PSNR of validation images"),
    "ssim": ("{:.3f}", "SSIM of validation images"),
    "rfid": ("{:.2f}", "rFID"),
    "fid": ("{:.2f}", "FID"),
    "perplexity": ("{:,.0f}", "perplexity of their codes"),
    "nats_per_token": ("{:.2f}", "nats per validation code"),
    "class_accuracy": ("", "of samples are classified as their class"),  # formatted as in the table
}
