use super::*;
use crate::ggml::dequantize;
use crate::rng::SplitMix64;

pub(crate) const CODED: [GgmlType; 10] = [
    GgmlType::Q4_0,
    GgmlType::Q4_1,
    GgmlType::Q5_0,
    GgmlType::Q5_1,
    GgmlType::Q8_0,
    GgmlType::Q2_K,
    GgmlType::Q3_K,
    GgmlType::Q4_K,
    GgmlType::Q5_K,
    GgmlType::Q6_K,
];
const FLOATS: [GgmlType; 3] = [GgmlType::F32, GgmlType::F16, GgmlType::BF16];

/// Byte offsets of the f16 scales of a block.
fn halves(ty: GgmlType) -> &'static [usize] {
    match ty {
        GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4_K | GgmlType::Q5_K => &[0, 2],
        GgmlType::Q2_K => &[80, 82],
        GgmlType::Q3_K => &[108],
        GgmlType::Q6_K => &[208],
        _ => &[0],
    }
}

/// Blocks of random bits with finite scales, positive and negative.
pub(crate) fn random_blocks(ty: GgmlType, n_blocks: usize, rng: &mut SplitMix64) -> Vec<u8> {
    let size = ty.block_bytes() as usize;
    let mut bytes: Vec<u8> = (0..n_blocks * size).map(|_| rng.draw() as u8).collect();
    for block in bytes.chunks_exact_mut(size) {
        for &at in halves(ty) {
            let d = f16::from_f32(0.01 * rng.normal());
            block[at..at + 2].copy_from_slice(&d.to_le_bytes());
        }
    }
    bytes
}

fn random_row(ty: GgmlType, n: usize, rng: &mut SplitMix64) -> Vec<u8> {
    match ty {
        GgmlType::F32 => (0..n).flat_map(|_| rng.normal().to_le_bytes()).collect(),
        GgmlType::F16 => (0..n)
            .flat_map(|_| f16::from_f32(rng.normal()).to_le_bytes())
            .collect(),
        GgmlType::BF16 => (0..n)
            .flat_map(|_| bf16::from_f32(rng.normal()).to_le_bytes())
            .collect(),
        _ => random_blocks(ty, n / ty.block_len() as usize, rng),
    }
}

#[test]
fn decoded_values_are_ggmls() {
    let n = 256 * 40;
    for &ty in CODED.iter().chain(&FLOATS) {
        let bytes = random_row(ty, n, &mut SplitMix64(ty.id().into()));
        let mut cells = Cells::default();
        Grid::new(ty, n)
            .unwrap()
            .decode(&bytes, &mut cells)
            .unwrap();
        let mut wanted = vec![0f32; n];
        dequantize(ty.id(), &bytes, &mut wanted).unwrap();
        for (i, w) in wanted.iter().enumerate() {
            // Compilers may fuse ggml's multiplication and subtraction: then, and only then,
            // the last bit differs.
            let fused = if cells.step.is_empty() {
                cells.value[i]
            } else {
                cells.step[i].mul_add(cells.code[i] as f32, cells.offset[i])
            };
            assert!(
                *w == cells.value[i] || *w == fused,
                "{ty} element {i}: wanted {w:e}, found {:e} or {fused:e}",
                cells.value[i]
            );
        }
    }
}

#[test]
fn symmetric_types_decode_to_the_bit() {
    let n = 256 * 40;
    for ty in [
        GgmlType::Q4_0,
        GgmlType::Q5_0,
        GgmlType::Q8_0,
        GgmlType::Q3_K,
        GgmlType::Q6_K,
    ] {
        let bytes = random_row(ty, n, &mut SplitMix64(77));
        let mut cells = Cells::default();
        Grid::new(ty, n)
            .unwrap()
            .decode(&bytes, &mut cells)
            .unwrap();
        let mut wanted = vec![0f32; n];
        dequantize(ty.id(), &bytes, &mut wanted).unwrap();
        assert_eq!(cells.value, wanted, "{ty}");
    }
}

#[test]
fn the_same_codes_give_the_same_bytes() {
    let n = 512;
    for &ty in CODED.iter().chain(&FLOATS) {
        let bytes = random_row(ty, n, &mut SplitMix64(1));
        let grid = Grid::new(ty, n).unwrap();
        let mut cells = Cells::default();
        grid.decode(&bytes, &mut cells).unwrap();
        let mut out = bytes.clone();
        assert_eq!(grid.encode(&cells.code, &mut out).unwrap(), 0, "{ty}");
        assert_eq!(out, bytes, "{ty}");
    }
}

#[test]
fn new_codes_are_read_back_and_nothing_else_moves() {
    let n = 512;
    for ty in CODED {
        let mut rng = SplitMix64(u64::from(ty.id()) + 9);
        let bytes = random_row(ty, n, &mut rng);
        let grid = Grid::new(ty, n).unwrap();
        let mut cells = Cells::default();
        grid.decode(&bytes, &mut cells).unwrap();
        let Kind::Codes {
            range: (low, high), ..
        } = grid.kind
        else {
            panic!("{ty} has codes");
        };
        let new: Vec<i32> = (0..n)
            .map(|_| low + rng.below((high - low + 1) as usize) as i32)
            .collect();
        let mut out = bytes.clone();
        let changed = grid.encode(&new, &mut out).unwrap();
        let differ = new.iter().zip(&cells.code).filter(|(a, b)| a != b).count();
        assert_eq!(changed, differ, "{ty}");
        let mut after = Cells::default();
        grid.decode(&out, &mut after).unwrap();
        assert_eq!(after.code, new, "{ty}");
        assert_eq!(after.step, cells.step, "{ty}: steps");
        assert_eq!(after.offset, cells.offset, "{ty}: offsets");

        // The union of the bits that any code change can flip is exactly bits-per-code wide:
        // all else in the block is scales, and stays.
        let (mut zeros, mut ones) = (bytes.clone(), bytes.clone());
        grid.encode(&vec![low; n], &mut zeros).unwrap();
        grid.encode(&vec![high; n], &mut ones).unwrap();
        if ty != GgmlType::Q8_0 {
            let flipped: u32 = zeros
                .iter()
                .zip(&ones)
                .map(|(a, b)| (a ^ b).count_ones())
                .sum();
            assert_eq!(
                flipped as usize,
                n * Layout::of(ty).unwrap().bits() as usize,
                "{ty}"
            );
        }
        for (at, ((a, b), (c, d))) in bytes
            .iter()
            .zip(&out)
            .zip(zeros.iter().zip(&ones))
            .enumerate()
        {
            let code_bits = if ty == GgmlType::Q8_0 && at % 34 >= 2 {
                255
            } else {
                c ^ d
            };
            assert_eq!((a ^ b) & !code_bits, 0, "{ty} byte {at}");
        }
    }
}

#[test]
fn nearest_is_the_nearest_of_all_codes() {
    let n = 256;
    for ty in CODED {
        let mut rng = SplitMix64(u64::from(ty.id()) + 40);
        let bytes = random_row(ty, n, &mut rng);
        let grid = Grid::new(ty, n).unwrap();
        let mut cells = Cells::default();
        grid.decode(&bytes, &mut cells).unwrap();
        let Kind::Codes {
            range: (low, high), ..
        } = grid.kind
        else {
            panic!("{ty} has codes");
        };
        for i in 0..n {
            let reach = cells.step[i] * (high - low) as f32;
            let v = cells.value[i] + 0.7 * reach * rng.normal();
            let (q, value) = grid.nearest(&cells, i, v);
            assert!(q <= high && (q >= low || q == cells.code[i]));
            let best = (low..=high)
                .map(|q| (cells.step[i] * q as f32 + cells.offset[i] - v).abs())
                .fold(f32::INFINITY, f32::min);
            let slack = 1e-6 * (v.abs() + cells.offset[i].abs());
            assert!((value - v).abs() <= best + slack, "{ty} {v} {value} {best}");
        }
    }
}

#[test]
fn an_element_without_a_step_keeps_its_code() {
    // Q4_K with a zero super-scale: every weight is its offset.
    let mut bytes = random_blocks(GgmlType::Q4_K, 1, &mut SplitMix64(3));
    bytes[..2].fill(0);
    let grid = Grid::new(GgmlType::Q4_K, 256).unwrap();
    let mut cells = Cells::default();
    grid.decode(&bytes, &mut cells).unwrap();
    for i in 0..256 {
        assert_eq!(cells.value[i], cells.offset[i]);
        let found = grid.nearest(&cells, i, cells.value[i] + 1.0);
        assert_eq!(found, (cells.code[i], cells.offset[i]));
    }
}

#[test]
fn minus_128_stays_in_q8_0_and_is_never_made() {
    let mut bytes = random_blocks(GgmlType::Q8_0, 1, &mut SplitMix64(4));
    bytes[..2].copy_from_slice(&f16::ONE.to_le_bytes());
    bytes[2] = 0x80;
    bytes[3] = 0x81;
    let grid = Grid::new(GgmlType::Q8_0, 32).unwrap();
    let mut cells = Cells::default();
    grid.decode(&bytes, &mut cells).unwrap();
    assert_eq!((cells.code[0], cells.code[1]), (-128, -127));
    assert_eq!(grid.nearest(&cells, 0, -128.0).0, -128);
    assert_eq!(grid.nearest(&cells, 0, -300.0).0, -128);
    assert_eq!(grid.nearest(&cells, 0, -126.6).0, -127);
    assert_eq!(grid.nearest(&cells, 1, -300.0).0, -127);
}

#[test]
fn floats_saturate_and_round_to_even() {
    let row = f16::from_f32(1.0).to_le_bytes();
    let grid = Grid::new(GgmlType::F16, 1).unwrap();
    let mut cells = Cells::default();
    grid.decode(&row, &mut cells).unwrap();
    assert_eq!(grid.nearest(&cells, 0, 1e9).1, 65504.0);
    assert_eq!(grid.nearest(&cells, 0, 2049.0).1, 2048.0);
}

#[test]
fn rows_that_are_no_blocks_and_types_without_grid_are_refused() {
    for ty in CODED {
        let n = ty.block_len() as usize + 1;
        assert!(matches!(
            Grid::new(ty, n),
            Err(RoundError::RowLength { .. })
        ));
        assert!(Grid::new(ty, 0).is_err());
    }
    for ty in [
        GgmlType::IQ4_XS,
        GgmlType::TQ1_0,
        GgmlType::MXFP4,
        GgmlType::I32,
    ] {
        assert!(matches!(Grid::new(ty, 256), Err(RoundError::NoGrid { .. })));
    }
    let grid = Grid::new(GgmlType::Q4_0, 32).unwrap();
    let e = grid.decode(&[0; 17], &mut Cells::default());
    assert!(matches!(e, Err(RoundError::Length { found: 17, .. })));
    assert!(grid.encode(&[0; 31], &mut [0; 18]).is_err());
}

#[test]
fn a_scale_that_is_not_finite_is_refused_by_place() {
    let mut bytes = random_blocks(GgmlType::Q4_0, 4, &mut SplitMix64(8));
    bytes[3 * 18..3 * 18 + 2].copy_from_slice(&f16::NAN.to_le_bytes());
    let grid = Grid::new(GgmlType::Q4_0, 64).unwrap();
    let e = grid.decode(&bytes, &mut Cells::default());
    assert!(matches!(
        e,
        Err(RoundError::NotFinite {
            row: 1,
            column: 32,
            ..
        })
    ));
}
