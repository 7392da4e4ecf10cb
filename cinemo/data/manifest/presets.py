"""The columns of a manifest, and which columns of the field's data sets they are.

As `columns.Columns` reads them: a column's name, or a text with names in braces.
"""

from __future__ import annotations

from collections.abc import Mapping

REQUIRED = ("clip_id", "uri", "caption")
OPTIONAL = ("start", "end")
TARGETS = (*REQUIRED, *OPTIONAL)
# Where the videos of a data set lie is everybody's own matter; `uri=...` after the name says it.
PRESETS: Mapping[str, Mapping[str, str]] = {
    # videoid,contentUrl,duration,page_dir,name
    "webvid": {"clip_id": "videoid", "uri": "videos/{page_dir}/{videoid}.mp4", "caption": "name"},
    # video,caption,aesthetic score,motion score,temporal consistency score,camera motion,frame,fps,seconds
    "openvid-1m": {"clip_id": "video", "uri": "videos/{video}", "caption": "caption"},
    # {"YoutubeID", "Start_timestamp": "00:00:20.353", "End_timestamp", "Caption", "Aesthetic_Score", "UMT_Score"}
    "internvid": {
        "clip_id": "{YoutubeID}_{Start_timestamp}_{End_timestamp}",
        "uri": "videos/{YoutubeID}.mp4",
        "caption": "Caption",
        "start": "Start_timestamp",
        "end": "End_timestamp",
    },
    # {"video_id", "url", "clip": [{"clip_id": "ID.0.mp4", "span": ["00:00:17.759", "00:00:23.279"]}, ...]}; no captions
    "hd-vila-100m": {
        "each": "clip",
        "clip_id": "clip.clip_id",
        "uri": "videos/{video_id}.mp4",
        "start": "clip.span.0",
        "end": "clip.span.1",
    },
    # videoID,url,timestamp,caption,matching_score and two more since; from timestamp on lists of Python, as text
    "panda-70m": {
        "each": "timestamp,caption,matching_score?,desirable_filtering?,shot_boundary_detection?",
        "clip_id": "{videoID}_{index}",
        "uri": "videos/{videoID}.mp4",
        "caption": "caption",
        "start": "timestamp.0",
        "end": "timestamp.1",
    },
    # metadata.csv or metadata.jsonl beside the videos
    "videofolder": {"clip_id": "file_name", "uri": "file_name", "caption": "caption|text|prompt"},
}
