"""Ground truth and detections at random, for tests of the metric and for its benchmark."""

import numpy as np


def made_up(images: int, detections: int, classes: int, objects: int = 7) -> tuple[dict, list[dict]]:
    """Return ground truth in COCO's format, and results: half of the detections are near an object."""
    rng = np.random.default_rng(0)
    annotations, results = [], []
    for image in range(1, images + 1):
        count = rng.poisson(objects)
        sides = np.exp(rng.uniform(2.3, 5.5, (count, 2)))  # 10 to 245 pixels
        boxes = np.concatenate([rng.uniform(0, 1, (count, 2)) * np.maximum([640, 480] - sides, 1), sides], axis=1)
        labels = rng.integers(1, classes + 1, count)
        for box, label in zip(boxes.tolist(), labels.tolist()):
            one = {"id": len(annotations) + 1, "image_id": image, "category_id": label, "bbox": box}
            annotations.append({**one, "area": box[2] * box[3], "iscrowd": int(rng.random() < 0.02)})
        for _ in range(detections):
            if count and rng.random() < 0.5:
                near = rng.integers(count)
                box = boxes[near] + rng.normal(0, 0.12, 4) * np.tile(sides[near], 2)
                label = labels[near] if rng.random() < 0.8 else rng.integers(1, classes + 1)
            else:
                box = np.concatenate([rng.uniform(0, 1, 2) * [600, 440], np.exp(rng.uniform(2.3, 5.5, 2))])
                label = rng.integers(1, classes + 1)
            one = {"image_id": image, "category_id": int(label), "bbox": np.maximum(box, [0, 0, 1, 1]).tolist()}
            results.append({**one, "score": round(rng.random(), 3)})  # many are equal
    listed = [{"id": i, "width": 640, "height": 480, "file_name": f"{i}.jpg"} for i in range(1, images + 1)]
    categories = [{"id": k, "name": str(k)} for k in range(1, classes + 1)]
    return {"images": listed, "annotations": annotations, "categories": categories}, results
