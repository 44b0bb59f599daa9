"""The detections of many images in files that grow: COCO's JSON, CSV and GeoJSON."""

import csv
import io
import json
from collections.abc import Sequence
from contextlib import ExitStack

from detectron2.data import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from matplotlib.colors import to_rgb

from ..data.csv_file import COLUMNS
from ..evaluation.style import class_color
from ..files.growing import GrowingFile, GrowingJson
from ..files.write import free_paths


class Results:
    """Detections in COCO's results format, with the images and categories that their ids refer to, and in others.

    They are written as they come, to detections.json and images.json, and to detections.csv if it is asked for; the
    names have the same number, if any. A GeoJSON file is of one image or video.

    Args:
        metadata: the class names, and the ids of the categories if the data set has its own; otherwise a category's id
            is the index of its class, and its name is the id.
        folder: where to write.
        csv: write a CSV file too.
        geojson: write GeoJSON files too.

    Attributes:
        images: an entry for each image, with ids from 1. ``file_name`` is the path as given, ``annotated`` the name of
            the annotated copy, and ``frame_id`` the number of a video's frame, from 0.
        detections: an entry for each detection.

    Raises:
        OSError: the files cannot be written.
    """

    def __init__(self, metadata: Metadata, folder: str, *, csv: bool = False, geojson: bool = False):
        names = metadata.get("thing_classes")
        self._names = dict(enumerate(names)) if names else None
        self._ids = {index: key for key, index in metadata.get("thing_dataset_id_to_contiguous_id", {}).items()}
        self._found: set[int] = set()  # indices of classes
        detections, images, *table = free_paths(folder, "detections.json", "images.json", *["detections.csv"] * csv)
        self.detections = GrowingJson(detections)
        head = {"info": {"description": "The images of the detections."}, "annotations": []}
        self.images = GrowingJson(images, f'{json.dumps(head)[:-1]}, "images": ', self._categories())
        self._table = GrowingFile(table[0], _csv_lines([(*COLUMNS, "score", "frame_id")])) if csv else None
        self._geojson = geojson
        self._shapes: GrowingJson | None = None  # of the current image or video

    def beside(self, name: str) -> list[str]:
        """Return the names of the files that the image or video ``name`` gets for itself: its GeoJSON, if any."""
        return [f"{name}.geojson"] * self._geojson

    def add(self, instances: Instances, beside: Sequence[str], **image) -> None:
        """Add an image with its detections, which are on the CPU.

        Args:
            instances: the detections.
            beside: paths with the names that ``beside`` returned, the same for all frames of a video.
            **image: further fields of the image's entry.

        Raises:
            OSError: they could not be written.
        """
        (height, width), number = instances.image_size, self.images.count + 1
        found = instances_to_coco_json(instances, number)
        self._found |= {one["category_id"] for one in found}
        found = [{**one, "category_id": self._ids.get(one["category_id"], one["category_id"])} for one in found]
        with ExitStack() as undo:  # after an error, all files have the images before
            # The image first: a detection of an image that is not in the list is none of COCO's.
            self.images.add([{"id": number, **image, "height": height, "width": width}], self._categories())
            undo.callback(self.images.undo)
            if self._table:
                self._table.append(_csv_lines(self._rows(instances, image)))
                undo.callback(self._table.undo)
            for path in beside:
                self._open_shapes(path, image["file_name"]).add(self._features(instances, image))
                undo.callback(self._shapes.undo)
            self.detections.add(found)
            undo.pop_all()

    def _label(self, index: int) -> str:
        return self._names[index] if self._names else str(self._ids.get(index, index))

    def _rows(self, instances: Instances, image: dict) -> list[tuple]:
        """A row of the CSV file for each detection; without any, one that has the image alone."""
        frame = image.get("frame_id", "")
        rows = [
            (image["file_name"], *(f"{side:.10g}" for side in box), self._label(k), f"{score:.10g}", frame)
            for box, k, score in _triples(instances)
        ]
        return rows or [(image["file_name"], "", "", "", "", "", "", frame)]

    def _features(self, instances: Instances, image: dict) -> list[dict]:
        """A feature of GeoJSON for each detection, with the properties that QuPath reads, and flat ones."""
        frame = {"frame_id": image["frame_id"]} if "frame_id" in image else {}
        return [
            {
                "type": "Feature",
                # Counterclockwise in numbers, as RFC 7946 has it.
                "geometry": {"type": "Polygon", "coordinates": [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]]},
                "properties": {
                    "objectType": "detection",
                    "classification": {
                        "name": self._label(k),
                        "color": [round(255 * part) for part in to_rgb(class_color(k))],
                    },
                    "measurements": {"score": score},
                    "label": self._label(k),
                    "score": score,
                    **frame,
                },
            }
            for (x0, y0, x1, y1), k, score in _triples(instances)
        ]

    def _open_shapes(self, path: str, file_name: str) -> GrowingJson:
        if self._shapes is None or self._shapes.path != path:
            self._close_shapes()
            head = {"type": "FeatureCollection", "image": file_name}
            self._shapes = GrowingJson(path, f'{json.dumps(head)[:-1]}, "features": ', "}")
        return self._shapes

    def _close_shapes(self) -> None:
        if self._shapes:
            shapes, self._shapes = self._shapes, None
            shapes.close()

    def _categories(self) -> str:
        """The end of images.json: the categories, of a data set without names those that were found."""
        indices = self._names or sorted(self._found)
        categories = [{"id": self._ids.get(index, index), "name": self._label(index)} for index in indices]
        return f', "categories": {json.dumps(categories)}}}'

    def close(self) -> list[str]:
        """Close the files, and return the paths of those of all images.

        Raises:
            OSError: one could not be synced to the disk.
        """
        self._close_shapes()
        files = [file for file in (self.detections, self.images, self._table) if file]
        for file in files:
            file.close()
        return [file.path for file in files]


def _triples(instances: Instances) -> zip:
    """The box (x0, y0, x1, y1) in pixels, the class and the score of each detection."""
    boxes, classes, scores = instances.pred_boxes.tensor, instances.pred_classes, instances.scores
    return zip(boxes.tolist(), classes.tolist(), scores.tolist(), strict=True)


def _csv_lines(rows: Sequence[tuple]) -> str:
    csv.writer(file := io.StringIO(), lineterminator="\n").writerows(rows)
    return file.getvalue()
