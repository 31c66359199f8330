"""A fixed sample of mmdet's configs: a cheap one for every backbone type that runs, and for many folders."""
from rl_mmdet.engine import UserError

SAMPLE = (
    'atss/atss_r18_fpn_8xb8-amp-lsj-200e_coco.py',
    'autoassign/autoassign_r50-caffe_fpn_1x_coco.py',
    'boxinst/boxinst_r50_fpn_ms-90k_coco.py',
    'centernet/centernet_r18_8xb16-crop512-140e_coco.py',
    'centripetalnet/centripetalnet_hourglass104_16xb6-crop511-210e-mstest_coco.py',
    'condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py',
    'deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py',
    'detectors/htc_r50-sac_1x_coco.py',
    'detr/detr_r18_8xb2-500e_coco.py',
    'dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco.py',
    'efficientnet/retinanet_effb3_fpn_8xb4-crop896-1x_coco.py',
    'fast_rcnn/fast-rcnn_r101_fpn_1x_coco.py',
    'faster_rcnn/faster-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco.py',
    'fcos/fcos_r18_fpn_gn-head-center-normbbox-centeronreg-giou_8xb8-amp-lsj-200e_coco.py',
    'foveabox/fovea_r101_fpn_4xb4-1x_coco.py',
    'fpg/retinanet_r50_fpg-chn128_crop640_50e_coco.py',
    'free_anchor/freeanchor_r50_fpn_1x_coco.py',
    'fsaf/fsaf_x101-64x4d_fpn_1x_coco.py',
    'gfl/gfl_r101_fpn_ms-2x_coco.py',
    'ghm/retinanet_r50_fpn_ghm-1x_coco.py',
    'hrnet/mask-rcnn_hrnetv2p-w18-1x_coco.py',
    'ld/ld_r18-gflv1-r101_fpn_1x_coco.py',
    'legacy_1.x/retinanet_r50_fpn_1x_coco_v1.py',
    'libra_rcnn/libra-retinanet_r50_fpn_1x_coco.py',
    'mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco-panoptic.py',
    'mask2former_vis/mask2former_r101_8xb2-8e_youtubevis2019.py',
    'maskformer/maskformer_r50_ms-16xb1-75e_coco.py',
    'nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco.py',
    'objects365/retinanet_r50_fpn_1x_objects365v1.py',
    'openimages/faster-rcnn_r50_fpn_32xb2-1x_openimages-challenge.py',
    'paa/paa_r50_fpn_1.5x_coco.py',
    'pafpn/faster-rcnn_r50_pafpn_1x_coco.py',
    'pisa/retinanet-r50_fpn_pisa_1x_coco.py',
    'pvt/retinanet_pvt-t_fpn_1x_coco.py',
    'pvt/retinanet_pvtv2-b1_fpn_1x_coco.py',
    'regnet/retinanet_regnetx-1.6GF_fpn_1x_coco.py',
    'reppoints/reppoints-partial-minmax_r50_fpn-gn_head-gn_1x_coco.py',
    'res2net/htc_res2net-101_fpn_20e_coco.py',
    'resnest/faster-rcnn_s50_fpn_syncbn-backbone+head_ms-range-1x_coco.py',
    'retinanet/retinanet_r18_fpn_8xb8-amp-lsj-200e_coco.py',
    'rpn/rpn_r50-caffe-c4_1x_coco.py',
    'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py',
    'sabl/sabl-retinanet_r50-gn_fpn_1x_coco.py',
    'solov2/solov2-light_r18_fpn_ms-3x_coco.py',
    'tood/tood_r50_fpn_1x_coco.py',
    'wider_face/retinanet_r50_fpn_1x_widerface.py',
    'yolact/yolact_r50_1xb8-55e_coco.py',
    'yolo/yolov3_d53_8xb8-320-273e_coco.py',
    'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py',
    'yolof/yolof_r50-c5_8xb8-1x_coco.py',
    'yolox/yolox_nano_8xb8-300e_coco.py',
)


def sample(count: int = len(SAMPLE)) -> list[str]:
    """The first ``count`` names.

    Raises:
        UserError: there aren't that many.
    """
    if not 1 <= count <= len(SAMPLE):
        raise UserError(f'--sample {count}: must be from 1 to {len(SAMPLE)}')
    return list(SAMPLE[:count])
