#!/usr/bin/env bash
# Trains the shipped base model from random weights and puts it into the package; then the main job
# trains the second shipped model from it. Run from the repository's root.
set -euo pipefail

refer='runs/refer/shapes_train-*.tfrecord'
framed='runs/framed/shapes_train-*.tfrecord'
python -m scripts.make_shapes --out runs/refer --train 24000 --task refer --seed 1000
python -m scripts.make_shapes --out runs/framed --train 20800 --task framed --seed 2000
python -m scripts.pretrain_perception --data "$refer" --out runs/shapes_perception
python -m scripts.pretrain_grounding --base runs/shapes_perception --data "$refer" \
  --out runs/shapes_grounding
python -m scripts.pretrain_language --base runs/shapes_grounding --data "$refer" \
  --out runs/shapes_language
python -m scripts.pretrain_language --framed --steps 1300 --base runs/shapes_language \
  --data "$framed" --out runs/shapes_framed
python -m scripts.ship_model --model runs/shapes_framed --name shapes_base
python -m vrt_jax.train
python -m scripts.ship_model --model runs/shapes_sft/model --name shapes_sft
