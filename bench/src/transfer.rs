//! The request that an attention instance of the full Step-3 model sends for one MoE layer.

use stepmesh_mesh::{Direction, MeshError, PartSpec, SlotLayout};
use stepmesh_proto::{Dtype, Header, Part};

/// Step-3's hidden size.
pub const HIDDEN: usize = 7168;
/// Experts that each token visits.
pub(crate) const TOP_K: u32 = 3;
/// Microbatches in flight.
const MICROBATCHES: u16 = 3;

/// A request's slots and its header, with BF16 both ways.
#[derive(Clone, Debug)]
pub struct Transfer {
    /// The deployment's slots.
    pub layout: SlotLayout,
    /// The request's parts: hidden state, expert ids, expert weights.
    pub parts: [Part; 3],
    /// The request's header, its parts in place.
    pub header: Header,
}

impl Transfer {
    /// A request of `rows` tokens, in slots of just that size.
    ///
    /// # Errors
    /// The rows take a slot beyond 4 GiB.
    pub fn new(rows: u32) -> Result<Self, MeshError> {
        let part = |key, dtype: Dtype, elements: u32| {
            let row_bytes = elements * dtype.bytes() as u32;
            Part { key, dtype, rows, row_bytes, offset: 0 }
        };
        let parts = [part(0, Dtype::Bf16, HIDDEN as u32), part(1, Dtype::U16, TOP_K), part(2, Dtype::F32, TOP_K)];
        let spec = |part: &Part| PartSpec { row_bytes: part.row_bytes, max_rows: rows };
        let layout = SlotLayout::new(MICROBATCHES, parts.iter().map(spec).collect(), vec![spec(&parts[0])])?;
        let mut header = Header::default();
        (header.incarnation, header.slot, header.sequence, header.group) = (1, 1, 7, 4);
        layout.place(Direction::A2F, &parts, &mut header)?;
        Ok(Self { layout, parts, header })
    }
}
