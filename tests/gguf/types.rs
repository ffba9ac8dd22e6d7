//! The type table against the C compiler's view of ggml.

use nepenthe::gguf::GgmlType;

/// Printed by `block_sizes.c`: name, elements and bytes per block.
const GOLDEN: &[(&str, u64, u64)] = &[
    ("q4_0", 32, 18),
    ("q4_1", 32, 20),
    ("q5_0", 32, 22),
    ("q5_1", 32, 24),
    ("q8_0", 32, 34),
    ("q8_1", 32, 36),
    ("q2_K", 256, 84),
    ("q3_K", 256, 110),
    ("q4_K", 256, 144),
    ("q5_K", 256, 176),
    ("q6_K", 256, 210),
    ("q8_K", 256, 292),
    ("iq2_xxs", 256, 66),
    ("iq2_xs", 256, 74),
    ("iq3_xxs", 256, 98),
    ("iq1_s", 256, 50),
    ("iq4_nl", 32, 18),
    ("iq3_s", 256, 110),
    ("iq2_s", 256, 82),
    ("iq4_xs", 256, 136),
    ("iq1_m", 256, 56),
    ("tq1_0", 256, 54),
    ("tq2_0", 256, 66),
    ("mxfp4", 32, 17),
    ("nvfp4", 64, 36),
    ("q1_0", 128, 18),
    ("q2_0", 64, 18),
];

#[test]
fn block_sizes_match_the_c_structs() {
    for &(name, len, bytes) in GOLDEN {
        let ty = GgmlType::from_name(name).unwrap();
        assert_eq!(
            (ty.name(), ty.block_len(), ty.block_bytes()),
            (name, len, bytes)
        );
    }
    let plain = GgmlType::ALL.iter().filter(|ty| !ty.is_quantized());
    assert_eq!(plain.count() + GOLDEN.len(), GgmlType::ALL.len());
}

#[test]
fn ids_and_names_round_trip() {
    for &ty in GgmlType::ALL {
        assert_eq!(GgmlType::from_u32(ty.id()), Some(ty));
        assert_eq!(GgmlType::from_name(&ty.file_name()), Some(ty));
    }
    let known = (0..1000).filter(|&id| GgmlType::from_u32(id).is_some());
    assert_eq!(known.count(), GgmlType::ALL.len());
    assert_eq!(GgmlType::Q4_K.to_string(), "q4_K");
    assert_eq!(GgmlType::Q4_K.file_name(), "Q4_K");
}

#[test]
fn row_bytes_needs_whole_blocks_and_does_not_overflow() {
    assert_eq!(GgmlType::Q4_K.row_bytes(512), Some(288));
    assert_eq!(GgmlType::Q4_K.row_bytes(511), None);
    assert_eq!(GgmlType::F64.row_bytes(u64::MAX), None);
    assert_eq!(GgmlType::I8.row_bytes(u64::MAX), Some(u64::MAX));
}
