//! One side of a run: a device that spins, a member, an executor with synthetic stages.

use super::stages::{Pace, SyntheticAttention, SyntheticFfn, config};
use crate::BenchError;
use std::sync::Arc;
use std::time::Duration;
use stepmesh_mesh::control::Control;
use stepmesh_mesh::{AttentionMesh, FfnMesh, MemberOptions, Policy};
use stepmesh_model::{Dtype, ModelConfig};
use stepmesh_pipeline::{AttentionExecutor, AttentionSide, FfnExecutor, FfnSide, Wire, slot_layout, workload};
use stepmesh_transport::{Clock, Device, DeviceOptions, Endpoint, Provider};

/// Longer than an end ever spins: it has its CPU to itself.
const SPIN: Duration = Duration::from_secs(1);
/// Room for the longest run.
const KV_TOKENS: usize = 64 * 1024;

/// What both sides must agree on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) layers: u32,
    pub(super) microbatches: u16,
}

/// What a member is made of.
pub(super) type Parts = (Arc<dyn Device>, Box<dyn Endpoint>, Box<dyn Control>);

/// A device whose endpoints spin.
pub(super) fn open(provider: Provider, options: &DeviceOptions) -> Result<Arc<dyn Device>, BenchError> {
    Ok(stepmesh_transport::open(provider, &DeviceOptions { spin: SPIN, ..options.clone() })?)
}

fn member(shape: Shape) -> Result<(MemberOptions, ModelConfig), BenchError> {
    let (config, wire) = (config(shape.layers)?, Wire::of(Dtype::F32));
    let layout = slot_layout(&config, wire, shape.microbatches, 1)?;
    Ok((MemberOptions::new(layout, workload(&config, Dtype::F32, wire, 1)), config))
}

pub(super) fn attention(
    (device, endpoint, control): Parts,
    shape: Shape,
    pace: Pace,
    clock: Clock,
) -> Result<AttentionExecutor, BenchError> {
    let (member, config) = member(shape)?;
    let mesh = AttentionMesh::with_endpoint(member, device, endpoint, control, clock)?;
    let side = AttentionSide::Host(Box::new(SyntheticAttention { config, pace }));
    let (wire, queue) = (Wire::of(Dtype::F32), usize::from(shape.microbatches));
    Ok(AttentionExecutor::new(mesh, side, wire, KV_TOKENS, shape.microbatches, 1, queue)?)
}

pub(super) fn ffn(
    (device, endpoint, control): Parts,
    shape: Shape,
    pace: Pace,
    clock: Clock,
) -> Result<FfnExecutor, BenchError> {
    let (member, config) = member(shape)?;
    let mesh = FfnMesh::with_endpoint(member, device, endpoint, control, clock)?;
    let side = FfnSide::Host(Box::new(SyntheticFfn { config, pace }));
    Ok(FfnExecutor::new(mesh, side, Wire::of(Dtype::F32), Policy::All)?)
}
