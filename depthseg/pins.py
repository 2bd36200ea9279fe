"""What is known of published weights by file or repository: hashes, commits and sizes, for the rows of catalog.py."""

# SHA-256 of what the publishers offer, by file or repository: each is named alike by two or more public projects that pin it. Where
# a file is not listed, the hub's own name of it is compared, or a later copy with what came first.
SHA256 = {
    "yolov8n.pt": "f59b3d833e2ff32e194b5bb8e08d211dc7c5bdf144b90d2c8412c47ccfc83b36",
    "yolov8s.pt": "1f47a78bf100391c2a140b7ac73a1caae18c32779be7d310658112f7ac9aa78a",
    "yolov8m.pt": "5d4a90cdc7a21786cc59cd19778e9eafff836df9e2da32524737c7ee6efe4fe5",
    "yolov8x.pt": "3df4ada6b4dad6d657868f2fdf7faecfb34dcfccf3a25c4b82079064718524c8",
    "groundingdino_swint_ogc.pth": "3b3ca2563c77c69f651d7bd133e97139c186df06231157a64c507099c52bc799",
    "groundingdino_swinb_cogcoor.pth": "46270f7a822e6906b655b729c90613e48929d0f2bb8b9b76fd10a856f3ac6ab7",
    "mobile_sam.pt": "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
    "sam_vit_b_01ec64.pth": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    "sam_vit_l_0b3195.pth": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    "sam_vit_h_4b8939.pth": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    "vitdet_h_coco.pkl": "8601bc52000c8a87960f3db6a9672596c5e06ce33bc30a3b8f96a96efe42ae60",
    "efficientvit_sam_l0.pt": "c4f994b01a16d48bcf2fbbb089448cfbf58fae5811edfa8113c953b8b8cc64b8",
    "depth-anything/Depth-Anything-V2-Small-hf": "3152477ce0d8d6978d76b995120de97cb5b928701fd0f817769f59e249a16b70",
    "depth-anything/Depth-Anything-V2-Large-hf": "4e01e34ed5549b529b70b92d53226bc370f03041977b390d3dde45d47f516cf9",
    "IDEA-Research/grounding-dino-tiny": "1a2412ef99bd74bcd3c2a246fa1e48581f8889a1300c9051974741314fc042f3",
    "IDEA-Research/grounding-dino-base": "5548f844c928c4b6f411fa8cbcc2bfa8dbbba437cb1d513975519f93c2a9ed21",
    "ustc-community/dfine-nano-coco": "19e06bdc873da819920a8d373b879721a5b9759d822f8213220bb09abbdab58b",
    "PekingU/rtdetr_v2_r18vd": "d18309d0d7ea57048138885c4c6ecfcb1e24506fc6153b94ad484f8ab62c7115",
    "PekingU/rtdetr_v2_r50vd": "3331d977dbc0c7a6cdae9ec0b0b6ad156eb6720d65b7cf0fa710dcc541d88d71",
}
REVISIONS = {  # commits that public projects pin, likewise; the hub's `main` where none is listed
    "depth-anything/Depth-Anything-V2-Small-hf": "5426e4f0f36572d16453bbda7a8389317b1bef99",
    "depth-anything/Depth-Anything-V2-Base-hf": "b1958afc87fb45a9e3746cb387596094de553ed8",
    "depth-anything/Depth-Anything-V2-Large-hf": "7581137eff8d4e94f6e796d3baea0e9fa79b22d2",
    "LiheYoung/depth-anything-small-hf": "25216a913fa218ccb7d58cce818d52b728b6c1f6",
    "LiheYoung/depth-anything-large-hf": "27ccb0920352c0c37b3a96441873c8d37bd52fb6",
    "IDEA-Research/grounding-dino-tiny": "a2bb814dd30d776dcf7e30523b00659f4f141c71",
    "IDEA-Research/grounding-dino-base": "12bdfa3120f3e7ec7b434d90674b3396eccf88eb",
    "ustc-community/dfine-nano-coco": "066438d3d8f0da137a37b38fdf3368fd4afceced",
    "PekingU/rtdetr_v2_r18vd": "5650961749fa93567c0d46fc7f43ea4f9e914107",
    "PekingU/rtdetr_v2_r34vd": "5d60d8fb5eb2a3ee5575bf200ecbce4e2cfa420c",
    "PekingU/rtdetr_v2_r50vd": "282494075698cab9faa1096ae26856890030c817",
}
MEGABYTES = {  # of files whose page gives no size
    "yolov8n.pt": 6.5, "yolov8s.pt": 22.6, "yolov8m.pt": 52.1, "yolov8l.pt": 87.8, "yolov8x.pt": 136.9,
    "groundingdino_swint_ogc.pth": 694, "groundingdino_swinb_cogcoor.pth": 938.1,
    "depth-anything/Depth-Anything-V2-Small-hf": 99.2, "depth-anything/Depth-Anything-V2-Large-hf": 1341.3,
    "IDEA-Research/grounding-dino-tiny": 689.4, "IDEA-Research/grounding-dino-base": 933.4,
    "PekingU/rtdetr_v2_r18vd": 80.9, "PekingU/rtdetr_v2_r50vd": 172.2,
}  # fmt: skip
